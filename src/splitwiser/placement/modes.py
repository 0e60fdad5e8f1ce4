"""The table of modes: what each has and needs. A new mode is a row here and a module of this package that starts it."""

from dataclasses import dataclass

from splitwiser.errors import unknown
from splitwiser.placement.layout import ONE_MIXED, ONE_OF_EACH, WorkerLayout


@dataclass(frozen=True)
class Mode:
    """How the two phases are placed.

    ``module`` is that of this package which starts the mode (:class:`splitwiser.placement.start.ModeModule`), and
    ``checked_by`` that whose ``find_problem`` says why a device does not allow it, if any. ``layout`` is what its workers
    are where the user lays none out; None where the engine is transformers' own, without workers. ``laid_out``: a user may
    lay out its workers. ``one_of_each``: it has just one prefill and one decode worker. ``moves_shares``: it can move shares
    while it runs. ``shares_memory``: its workers are processes that share memory.
    """

    name: str
    module: str
    layout: WorkerLayout | None
    laid_out: bool = False
    one_of_each: bool = False
    moves_shares: bool = False
    shares_memory: bool = False
    needs_gpu: bool = False
    checked_by: str = ""


MODES = {
    mode.name: mode
    for mode in (
        Mode("generate", "reference", None),
        Mode("sequential", "inline", ONE_MIXED),
        Mode("mp", "processes", ONE_OF_EACH, laid_out=True, moves_shares=True, shares_memory=True),
        Mode("mps", "mps", ONE_OF_EACH, laid_out=True, shares_memory=True, needs_gpu=True, checked_by="mps_daemon"),
        Mode(
            "green",
            "green",
            ONE_OF_EACH,
            laid_out=True,
            one_of_each=True,
            moves_shares=True,
            needs_gpu=True,
            checked_by="green_contexts",
        ),
    )
}


def find_mode(name: str) -> Mode:
    """Return the mode of that name. Raises :class:`~splitwiser.errors.InputError`."""
    if name not in MODES:
        raise unknown("mode", name, MODES)
    return MODES[name]
