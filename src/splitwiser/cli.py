"""The ``splitwiser`` command."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from splitwiser import constants
from splitwiser.cases import load_cases
from splitwiser.catalog import load_catalog
from splitwiser.config import RunConfig
from splitwiser.errors import SplitwiserError
from splitwiser.summary import columns, run_summary


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
    config = RunConfig(**{field.name: getattr(options, field.name) for field in fields(RunConfig)})
    from splitwiser.run import run  # brings in torch and transformers, which the other commands do without

    result = run(config)
    print(run_summary(result.figures, result.directory))


def _report(options: argparse.Namespace) -> None:
    from splitwiser.report import write_report  # brings in matplotlib and pandas

    print(write_report(options.folders, options.output))


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="splitwiser", description="LLM inference with its two phases placed apart.")
    commands = parser.add_subparsers(required=True, metavar="command")
    debugging = argparse.ArgumentParser(add_help=False)
    debugging.add_argument("--debug", action="store_true", help="show a traceback with an error")
    run = commands.add_parser(
        "run",
        parents=[debugging],
        help="run a model over reports or a workload and write latency and throughput",
        description="Defaults come from src/splitwiser/constants.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for each in fields(RunConfig):
        flags = dict.fromkeys([f"--{each.name}", f"--{each.name.replace('_', '-')}"])
        if each.metadata["type"] is bool:
            run.add_argument(
                *flags, action=argparse.BooleanOptionalAction, help=each.metadata["help"], default=each.default
            )
        else:
            kind = each.metadata["type"]
            run.add_argument(
                *flags, type=kind, help=each.metadata["help"], default=each.default, metavar=each.name.upper()
            )
    run.set_defaults(command=_run)
    report = commands.add_parser(
        "report",
        parents=[debugging],
        help="write one HTML page about runs, comparisons, sweeps or profiles",
        description="Runs given together are compared. The page needs no network and no other file.",
        allow_abbrev=False,
    )
    report.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="folder that a command wrote")
    report.add_argument("--output", type=Path, help="the page (default: report.html in the first folder)")
    report.set_defaults(command=_report)
    cases = commands.add_parser("cases", parents=[debugging], help="list the prompting recipes")
    cases.set_defaults(command=_cases)
    models = commands.add_parser("models", parents=[debugging], help="list the models known by name")
    models.set_defaults(command=_models)
    return parser
