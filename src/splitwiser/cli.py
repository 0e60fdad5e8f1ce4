"""The ``splitwiser`` command."""

import argparse
import gc
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from splitwiser.errors import InputError, SplitwiserError

COMMANDS = {  # modules of splitwiser.commands, with their descriptions in `splitwiser --help`
    "run": "run a model over reports or a workload and write latency and throughput",
    "compare": "run several modes or layouts on the same requests, in interleaved rounds",
    "sweep": "run a grid of options from a YAML file; goes on where it was stopped",
    "profile": "measure both phases of a model on this machine, step by step",
    "advise": "predict every placement of the phases for a workload, check the best, and recommend one",
    "report": "write one HTML page about runs, comparisons, sweeps, profiles or advice",
    "doctor": "what this machine has and which modes will work on it, with the reason for each that will not",
    "cases": "list the prompting recipes",
    "models": "list the models known by name",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for a failure, 2 for invalid input, 130 after Ctrl-C, 143 after
    SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a character that the terminal lacks must not change the exit code
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser(given).parse_args(given)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _check_folder()
        options.run(options)
    except SplitwiserError as error:
        return _fail(f"splitwiser: {error}", error.exit_code, options.debug)
    except TerminatedError:
        return _fail("splitwiser: terminated", 128 + signal.SIGTERM, options.debug)
    except KeyboardInterrupt:
        return _fail("splitwiser: interrupted", 128 + signal.SIGINT, options.debug)
    except BrokenPipeError:  # the reader of our output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        line = f"splitwiser: {type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"
        return _fail(line, 1, options.debug)
    return 0


def _check_folder() -> None:
    """Raise :class:`InputError` in a folder that has been deleted, where importing PyTorch ends the process."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise InputError("the current folder has been deleted; change to one that exists") from error


class TerminatedError(KeyboardInterrupt):
    """SIGTERM; ends a run as Ctrl-C does, so that it leaves nothing behind."""


def _terminated(*_: object) -> None:
    # only once: a parent's death is signalled for each of its threads, and must not interrupt the clean-up
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise TerminatedError


def entry_point() -> None:
    """The ``splitwiser`` command as installed."""
    os.environ["PYTHONSAFEPATH"] = "1"  # our processes must import nothing from the current folder, which is the user's
    sys.unraisablehook = _interrupt_again
    gc.set_threshold(100_000)  # imports make a million objects that stay; the default goes through them again and again
    try:
        exit_code = main()
    except KeyboardInterrupt:  # another one, while the first was being reported
        exit_code = 128 + signal.SIGINT
    gc.freeze()  # Python's exit would go through them once more
    # only Python's own exit is left, where another Ctrl-C would print a traceback
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(exit_code)


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Interrupt the main thread a moment later if an interrupt came within a destructor, where Python would print a
    traceback and go on."""
    main_thread = threading.main_thread().ident
    if issubclass(unraisable.exc_type, KeyboardInterrupt) and main_thread is not None:
        threading.Timer(0.01, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _fail(line: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
    return exit_code


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each option, and no default for options without one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_no_default = action.default in (None, False, "", [])
        return action.help if has_no_default else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [each for each in action.option_strings if "-" not in each.lstrip("-").removeprefix("no-")]
        return " ".join([", ".join(spellings), *([action.metavar] if isinstance(action.metavar, str) else [])])


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser, with the arguments of the command in ``arguments``, whose module is the only one imported."""
    parser = argparse.ArgumentParser(prog="splitwiser", description="LLM inference with its two phases placed apart.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, help_text in COMMANDS.items():
        if name not in arguments[:1]:
            commands.add_parser(name, help=help_text)
            continue
        module = import_module(f"splitwiser.commands.{name}")
        command = commands.add_parser(
            name,
            usage=f"%(prog)s {module.USAGE}",
            help=help_text,
            description=module.DESCRIPTION,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--debug", action="store_true", help="show a traceback with an error")
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser
