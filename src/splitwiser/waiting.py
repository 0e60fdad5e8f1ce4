"""How OpenMP's threads wait for each other on a CPU: a bounded time of spinning, then asleep.

A step has some hundred parallel regions, and at the end of each the threads wait for the last one. Asleep they take long to
wake, which small steps feel; spinning without a bound they burn the processor that the last one waits for, wherever
processors are shared. GNU's OpenMP, which PyTorch's packages for Linux use, spins 300,000 times by default, up to 15 ms.

The bound is read once, as PyTorch is loaded, so this is set as the package is imported, before anything brings PyTorch in.
"""

import os
import sys

SPINS = "20000"  # 0.3 to 1.3 ms by processor: longer than the pauses within a step, shorter than a scheduler's turn
_VARIABLE = "GOMP_SPINCOUNT"
_USERS_OWN = ("OMP_WAIT_POLICY", _VARIABLE, "KMP_BLOCKTIME")

LATE = (
    "torch was imported before splitwiser, so its threads wait for each other as that import found it: on a machine that "
    f"others use, steps may be many times slower; import splitwiser first, or set {_VARIABLE}={SPINS} in the environment"
)


def wait_variables() -> dict[str, str]:
    """The environment that threads of a process to come wait by; empty where the user's own says how."""
    return {} if _users_own() else {_VARIABLE: SPINS}


def bound_waiting() -> None:
    """Have this process's threads, and those of its children, wait as :func:`wait_variables` say, unless PyTorch has been
    loaded already, which reads them once."""
    if "torch" not in sys.modules:
        os.environ.update(wait_variables())


def undo_bound() -> None:
    """Take :func:`bound_waiting` back before PyTorch is loaded, for an engine that waits as its makers meant it to."""
    if not _users_own():
        os.environ.pop(_VARIABLE, None)


def is_bounded() -> bool:
    """Whether this process's threads wait as they are meant to, or as the user says."""
    return _VARIABLE in os.environ or _users_own() is not None


def describe() -> str:
    """How the threads of this process wait, for a run's record."""
    if own := _users_own():
        return f"as {own}={os.environ[own]} says"
    if not is_bounded():
        return "as OpenMP does by default (torch was imported before splitwiser)"
    return f"{int(SPINS):,} spins, then asleep"


def _users_own() -> str | None:
    """The variable by which the user says how threads wait."""
    given = [name for name in _USERS_OWN if name in os.environ]
    return next((name for name in given if (name, os.environ[name]) != (_VARIABLE, SPINS)), None)
