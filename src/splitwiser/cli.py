"""The ``splitwiser`` command."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import TypeVar

from splitwiser import constants
from splitwiser.cases import load_cases
from splitwiser.catalog import load_catalog
from splitwiser.config import AdviseConfig, ProfileConfig, RunConfig, option_fields
from splitwiser.errors import SplitwiserError
from splitwiser.summary import columns, run_summary

Config = TypeVar("Config", RunConfig, ProfileConfig, AdviseConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for a fault, 2 for a wrong input, 130 after Ctrl-C, 143 after
    SIGTERM."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    try:
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


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does, so that nothing of it is left behind."""


def _terminated(*_: object) -> None:
    raise TerminatedError


def entry_point() -> None:
    """The ``splitwiser`` command as installed."""
    sys.exit(main())


def _fail(line: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
    return exit_code


def _run(options: argparse.Namespace) -> None:
    config = _configuration(RunConfig, options)
    from splitwiser.run import run  # brings in torch and transformers, which the other commands do without

    result = run(config)
    print(run_summary(result.figures, result.directory))


def _profile(options: argparse.Namespace) -> None:
    config = _configuration(ProfileConfig, options)
    from splitwiser.profile import profile, profile_summary

    print(profile_summary(profile(config)))


def _advise(options: argparse.Namespace) -> None:
    config = _configuration(AdviseConfig, options)
    from splitwiser.advice import advice_summary
    from splitwiser.advise import advise

    print(advice_summary(advise(config)))


def _configuration(kind: type[Config], options: argparse.Namespace) -> Config:
    return kind(**{field.name: getattr(options, field.name) for field in option_fields(kind)})


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
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [each for each in action.option_strings if "-" not in each.lstrip("-").removeprefix("no-")]
        return " ".join([", ".join(spellings), *([action.metavar] if isinstance(action.metavar, str) else [])])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="splitwiser", description="LLM inference with its two phases placed apart.")
    commands = parser.add_subparsers(required=True, metavar="command")
    debugging = argparse.ArgumentParser(add_help=False)
    debugging.add_argument("--debug", action="store_true", help="show a traceback with an error")
    run = commands.add_parser(
        "run",
        parents=[debugging],
        usage="%(prog)s [options]",
        help="run a model over reports or a workload and write latency and throughput",
        description="Defaults come from src/splitwiser/constants.py. A hyphen may stand for each underscore.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    _add_options(run, RunConfig)
    run.set_defaults(command=_run)
    profile = commands.add_parser(
        "profile",
        parents=[debugging],
        help="measure both phases of a model on this machine, step by step",
        description="Times prefill by prompt length and decode by batch size and context, against what the machine can do.",
        formatter_class=_HelpFormatter,
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    _add_options(profile, ProfileConfig)
    profile.set_defaults(command=_profile)
    advise = commands.add_parser(
        "advise",
        parents=[debugging],
        help="predict each placement of the phases for a workload, check the best, and recommend one",
        description="Profiles both phases briefly, predicts every placement, runs the best few. Takes the options of run.",
        formatter_class=_HelpFormatter,
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    _add_options(advise, AdviseConfig)
    advise.set_defaults(command=_advise)
    cases = commands.add_parser("cases", parents=[debugging], help="list the prompting recipes")
    cases.set_defaults(command=_cases)
    models = commands.add_parser("models", parents=[debugging], help="list the models known by name")
    models.set_defaults(command=_models)
    return parser


def _add_options(parser: argparse.ArgumentParser, kind: type[Config]) -> None:
    """An option for each field of ``kind``, in groups."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name in ("advice", "steps", "requests", "arrivals", "model and placement", "sampling", "results"):
        if any(each.metadata["group"] == name for each in option_fields(kind)):
            groups[name] = parser.add_argument_group(name)
    for each in option_fields(kind):
        group = groups[each.metadata["group"]]
        flags = dict.fromkeys([f"--{each.name}", f"--{each.name.replace('_', '-')}"])
        if each.metadata["type"] is bool:
            group.add_argument(
                *flags, action=argparse.BooleanOptionalAction, help=each.metadata["help"], default=each.default
            )
        else:
            group.add_argument(
                *flags, type=each.metadata["type"], help=each.metadata["help"], default=each.default,
                metavar=each.name.upper(),
            )  # fmt: skip
