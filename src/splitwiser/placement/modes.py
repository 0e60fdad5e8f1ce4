"""The table of modes: what each has and needs. A new mode is a row here, and what starts it in :mod:`splitwiser.llm`."""

from dataclasses import dataclass

from splitwiser.errors import unknown
from splitwiser.placement.layout import ONE_MIXED, ONE_OF_EACH, WorkerLayout


@dataclass(frozen=True)
class Mode:
    """How the two phases are placed.

    ``layout`` are its workers where the user lays none out; None: the engine is transformers' own, without workers. The
    flags: a user may lay out its workers; it can move shares while it runs; its workers are processes that share memory; it
    needs an NVIDIA GPU.
    """

    name: str
    layout: WorkerLayout | None
    laid_out: bool = False
    moves_shares: bool = False
    shares_memory: bool = False
    needs_gpu: bool = False


MODES = {
    mode.name: mode
    for mode in (
        Mode("generate", None),
        Mode("sequential", ONE_MIXED),
        Mode("mp", ONE_OF_EACH, laid_out=True, moves_shares=True, shares_memory=True),
        Mode("mps", ONE_OF_EACH, laid_out=True, shares_memory=True, needs_gpu=True),
        Mode("green", ONE_OF_EACH, laid_out=True, moves_shares=True, needs_gpu=True),
    )
}


def find_mode(name: str) -> Mode:
    """The mode of that name. Raises :class:`~splitwiser.errors.InputError`."""
    if name not in MODES:
        raise unknown("mode", name, MODES)
    return MODES[name]
