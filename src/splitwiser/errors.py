"""The two kinds of failure a user sees, each one clear line: a wrong input (exit code 2) and a fault (exit code 1)."""

import difflib
from collections.abc import Iterable


class SplitwiserError(Exception):
    """Base of every error that is reported as one line, without a traceback."""

    exit_code = 1


class InputError(SplitwiserError):
    """What the user gave is wrong: the message names the file or option, the fault and what would be right."""

    exit_code = 2


class UnsupportedModelError(InputError):
    """The engine cannot serve this architecture exactly; the message names the class and the reason."""


class RunError(SplitwiserError):
    """Something failed during a run; what was finished before is kept."""


class WorkerLostError(RunError):
    """A worker process, or the MPS daemon of all, died, failed or does not answer; the message names it and how."""


def unknown(kind: str, given: object, known: Iterable[object]) -> InputError:
    """An :class:`InputError` for a name that does not exist, with the nearest valid ones (all, if few or none is near)."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(given), names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near and len(names) > 8 else f"known: {', '.join(names)}"
    return InputError(f"unknown {kind} '{given}'; {hint}")


def first_line(error: BaseException) -> str:
    """What ``error`` says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
