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

from splitwiser.errors import InputError, SplitwiserError, unknown_name
from splitwiser.options import OptionParser, UsageError
from splitwiser.version import __version__

COMMANDS = {  # modules of splitwiser.commands, with their descriptions in `splitwiser --help`
    "run": "run a model over reports or a workload and write latency and throughput",
    "compare": "run several modes or layouts on the same requests, in interleaved rounds",
    "sweep": "run a grid of options from a YAML file; goes on where it was stopped",
    "profile": "measure both phases of a model on this machine, step by step",
    "advise": "predict every placement of the phases for a workload, check the best, and recommend one",
    "report": "write one HTML page about runs, comparisons, sweeps, profiles or advice",
    "doctor": "what this machine has and which modes will work on it, with the reason for each that will not",
    "cases": "list the prompting recipes",
    "models": "list the models known by name, or prove the tokens of one's architecture",
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
    debug = "--debug" in given
    signal.signal(signal.SIGTERM, _terminated)
    try:
        options = _parse(given)
        _check_folder()
        options.run(options)
    except SplitwiserError as error:
        usage = error.usage if isinstance(error, UsageError) else ""
        return _fail(f"{usage}splitwiser: {error.cli_message}", error.exit_code, debug)
    except TerminatedError:
        return _fail("splitwiser: terminated", 128 + signal.SIGTERM, debug)
    except KeyboardInterrupt:
        return _fail("splitwiser: interrupted", 128 + signal.SIGINT, debug)
    except BrokenPipeError:  # the reader of our output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        line = f"splitwiser: {type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"
        return _fail(line, 1, debug)
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
    # an interrupt within an exec of text, as when a dataclass is made, is remembered though it was handled, and Python would
    # end itself by SIGINT with another exit code; the next exec forgets it
    exec("")
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
    try:
        if debug:
            traceback.print_exc()
        print(line, file=sys.stderr, flush=True)
    except OSError as error:  # perhaps the very error that this line is about
        print(f"{line} (standard error cannot be written: {error.strerror})")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # Python's exit code is 120 if its flush fails
    return exit_code


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each option, and no default for options without one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_no_default = action.default in (None, False, "", [])
        return action.help if has_no_default else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [each for each in action.option_strings if "-" not in each.lstrip("-").removeprefix("no-")]
        return " ".join([", ".join(spellings), *([action.metavar] if isinstance(action.metavar, str) else [])])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; the module of their command is the only one imported. Raises :class:`UsageError`."""
    parser = OptionParser(prog="splitwiser", description="LLM inference with its two phases placed apart.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(required=True, metavar="command")
    given = next(iter(arguments), "-")
    for name, help_text in COMMANDS.items():
        if name != given:
            commands.add_parser(name, help=help_text)
            continue
        module = import_module(f"splitwiser.commands.{name}")
        command = commands.add_parser(
            name,
            usage=f"%(prog)s {module.USAGE}",
            help=help_text,
            description=module.DESCRIPTION,
            formatter_class=_HelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show a traceback with an error")
        command.set_defaults(run=module.run, parser=command)
        module.add_arguments(command)
    if given not in COMMANDS and not given.startswith("-"):
        parser.error(unknown_name("command", given, COMMANDS).cli_message)
    options, rest = parser.parse_known_args(arguments)
    if rest:
        options.parser.refuse(rest)
    return options
