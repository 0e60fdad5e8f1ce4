"""The ``splitwiser`` command."""

import argparse
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from splitwiser import constants
from splitwiser.config import AdviseConfig, DoctorConfig, ProfileConfig, RunConfig
from splitwiser.doctor.diagnose import diagnose
from splitwiser.errors import InputError, RunError, SplitwiserError
from splitwiser.model.catalog import load_catalog
from splitwiser.options import add_options, add_run_options, given_options
from splitwiser.results.terminal import columns, run_summary
from splitwiser.workload.cases import load_cases

ONE_PROCESS = "on a GPU: all runs in one process, one after another, so that imports take their time once"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for a fault, 2 for a wrong input, 130 after Ctrl-C, 143 after
    SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no exit code hangs on a letter that a terminal lacks
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _check_folder()
        options.command(options)
    except SplitwiserError as error:
        return _fail(f"splitwiser: {error}", error.exit_code, options.debug)
    except TerminatedError:
        return _fail("splitwiser: terminated", 128 + signal.SIGTERM, options.debug)
    except KeyboardInterrupt:
        return _fail("splitwiser: interrupted", 128 + signal.SIGINT, options.debug)
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        line = f"splitwiser: {type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"
        return _fail(line, 1, options.debug)
    return 0


def _check_folder() -> None:
    """Raises :class:`InputError` in a folder that has been deleted, where PyTorch ends a process as it is imported."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise InputError("the current folder has been deleted; change to one that is there") from error


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does, so that nothing of it is left behind."""


def _terminated(*_: object) -> None:
    # once: a parent's death is signalled again for each of its threads, and must not break into the clean-up
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise TerminatedError


def entry_point() -> None:
    """The ``splitwiser`` command as installed."""
    os.environ["PYTHONSAFEPATH"] = "1"  # our processes import nothing from the current folder, which is the user's
    try:
        exit_code = main()
    except KeyboardInterrupt:  # a further one, as the first was being told
        exit_code = 128 + signal.SIGINT
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only Python's own end is left, which a further Ctrl-C would litter
    sys.exit(exit_code)


def _fail(line: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
    return exit_code


def _run(options: argparse.Namespace) -> None:
    config = RunConfig(**given_options(options))
    from splitwiser.run import run  # brings in torch and transformers, which the other commands do without

    result = run(config)
    print(run_summary(result.figures, result.directory))


def _compare(options: argparse.Namespace) -> None:
    from splitwiser.study.compare import compare, make_variants

    modes = [mode.strip() for mode in options.modes.split(",") if mode.strip()]
    variants = make_variants(given_options(options), modes, options.variant)
    compare(variants, options.repeats, options.minutes, one_process=options.one_process)


def _sweep(options: argparse.Namespace) -> None:
    from splitwiser.study.sweep import list_points, read_sweep, sweep

    grid = read_sweep(options.file)
    if options.list:
        print(list_points(grid, options.results))
    else:
        sweep(grid, options.file, options.results, fresh=options.fresh, one_process=options.one_process)


def _profile(options: argparse.Namespace) -> None:
    config = ProfileConfig(**given_options(options, ProfileConfig))
    from splitwiser.study.profile import profile, profile_summary

    print(profile_summary(profile(config)))


def _advise(options: argparse.Namespace) -> None:
    config = AdviseConfig(**given_options(options, AdviseConfig))
    from splitwiser.study.advise import advise
    from splitwiser.study.recommend import advice_summary

    print(advice_summary(advise(config)))


def _report(options: argparse.Namespace) -> None:
    from splitwiser.results.report import write_report  # brings in matplotlib and pandas

    print(write_report(options.folders, options.output))


def _doctor(options: argparse.Namespace) -> None:
    diagnosis = diagnose(DoctorConfig(**{field.name: getattr(options, field.name) for field in fields(DoctorConfig)}))
    print(json.dumps(diagnosis.as_dict(), indent=2) if options.json else diagnosis)
    if not diagnosis.works:
        raise RunError("no mode will work here; the reasons are above")


def _cases(_: argparse.Namespace) -> None:
    rows = [
        (str(case.case_id), case.description, "" if case.method == "discrete" else "not supported yet")
        for case in load_cases(constants.DIR_CONFIGS / "cases.yaml").values()
    ]
    print(columns([("case_id", "description", ""), *rows]))


def _models(_: argparse.Namespace) -> None:
    rows = [
        (
            entry.name,
            entry.path or entry.hub,
            "encoder-decoder, not served" if entry.kind != "decoder" else "yes" if entry.config else "no",
        )
        for entry in load_catalog(constants.DIR_CONFIGS / "models.yaml").values()
    ]
    print(columns([("model", "from", "without a download, as dummy"), *rows]))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each option, and no default where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default in (None, False, "", [])
        return action.help if says_nothing else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [each for each in action.option_strings if "-" not in each.lstrip("-").removeprefix("no-")]
        return " ".join([", ".join(spellings), *([action.metavar] if isinstance(action.metavar, str) else [])])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="splitwiser", description="LLM inference with its two phases placed apart.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(
        name: str,
        call: Callable[[argparse.Namespace], None],
        help_text: str,
        description: str,
        usage: str = "[options]",
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            usage=f"%(prog)s {usage}",
            help=help_text,
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--debug", action="store_true", help="show a traceback with an error")
        command.set_defaults(command=call)
        return command

    command = add(
        "run", _run, "run a model over reports or a workload and write latency and throughput",
        "Defaults come from src/splitwiser/constants.py. A hyphen may stand for each underscore.",
    )  # fmt: skip
    add_run_options(command)

    command = add(
        "compare", _compare, "run several modes or layouts on the same requests, in interleaved rounds",
        "Every run is a fresh process, if not --one_process; a round runs each variant once.",
        "--modes MODE,MODE... [options of splitwiser run, for all variants]",
    )  # fmt: skip
    command.add_argument(
        "--modes", default="", help="variants by mode, such as generate,sequential,mp; the first is the base"
    )
    command.add_argument(
        "--variant", action="append", default=[], metavar="'NAME: OPTIONS'",
        help="a variant by options of splitwiser run, such as 'four: --mode mp --workers configs/workers/four_mixed.yaml'; "
        "may be repeated",
    )  # fmt: skip
    command.add_argument("--repeats", type=int, default=3, help="rounds")
    command.add_argument("--minutes", type=float, help="begin no round after so long, but the first")
    command.add_argument("--one_process", "--one-process", action="store_true", help=ONE_PROCESS)
    add_run_options(command, defaults=False)

    command = add(
        "sweep", _sweep, "run a grid of options from a YAML file; goes on where it was stopped",
        "Runs that have finished are kept; those that failed are tried again at the next start.", "FILE [options]",
    )  # fmt: skip
    command.add_argument("file", type=Path, metavar="FILE", help="the grid, such as those in configs/sweeps/")
    command.add_argument("--list", action="store_true", help="print the points and run nothing")
    command.add_argument("--one_process", "--one-process", action="store_true", help=ONE_PROCESS)
    command.add_argument("--fresh", action="store_true", help="start anew; the old results are kept under another name")
    command.add_argument(
        "--results", type=Path, default=constants.DIR_RESULTS, help="directory that gets a folder for this sweep"
    )

    command = add(
        "profile", _profile, "measure both phases of a model on this machine, step by step",
        "Times prefill by prompt length and decode by batch size and context, against what the machine can do.",
    )  # fmt: skip
    add_options(command, ProfileConfig)

    command = add(
        "advise", _advise, "predict every placement of the phases for a workload, check the best, and recommend one",
        "Profiles both phases briefly, predicts every placement, runs the best few. Takes the options of run.",
    )  # fmt: skip
    add_options(command, AdviseConfig)

    command = add(
        "report", _report, "write one HTML page about runs, comparisons, sweeps, profiles or advice",
        "Runs given together are compared. The page needs no network and no other file.", "RUN... [options]",
    )  # fmt: skip
    command.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="folder that a command wrote")
    command.add_argument("--output", type=Path, help="the page (default: report.html in the first folder)")

    command = add(
        "doctor", _doctor, "what this machine has and which modes will work on it, with the reason for each that will not",
        "Exit code 0 if at least one mode will work for the model, else 1.",
    )  # fmt: skip
    add_run_options(command, [field.name for field in fields(DoctorConfig) if field.name != "hub"])
    command.add_argument(
        "--hub", action="store_true", help="also try whether the hub can be reached, and has the model"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    add("cases", _cases, "list the prompting recipes", "The recipes of configs/cases.yaml.")
    add("models", _models, "list the models known by name", "The models of configs/models.yaml.")
    return parser
