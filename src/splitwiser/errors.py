"""Errors that users see, each as one clear line: invalid input (exit code 2) and failures (exit code 1)."""

import difflib
from collections.abc import Iterable


class SplitwiserError(Exception):
    """Base class of errors that are reported as one line, without a traceback."""

    exit_code = 1


class InputError(SplitwiserError):
    """Invalid input of the user: the message names the file or option, what is wrong and what would be right."""

    exit_code = 2


class UnsupportedModelError(InputError):
    """The engine cannot serve this architecture exactly; the message names the class and the reason."""


class RunError(SplitwiserError):
    """A failure during a run; results finished before it are kept."""


class WorkerLostError(RunError):
    """A worker or the MPS daemon died, failed or does not answer; the message names it and the cause."""


def unknown(kind: str, given: object, known: Iterable[object]) -> InputError:
    """Return an :class:`InputError` for an unknown name, with the most similar valid names (all, if few or none similar)."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(given), names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near and len(names) > 8 else f"known: {', '.join(names)}"
    return InputError(f"unknown {kind} '{given}'; {hint}")


def first_line(error: BaseException) -> str:
    """Return the first line of ``error``'s message, or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
