"""The tables of modes, which place the two phases, and of back ends, which compute them.

A new mode is a row here and a module of this package that starts it; a new back end is a row and a package of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from splitwiser.errors import unknown_name
from splitwiser.placement.layout import ONE_MIXED, ONE_OF_EACH, WorkerLayout


@dataclass(frozen=True)
class Mode:
    """A placement of the two phases.

    ``module`` of this package starts the mode (:class:`splitwiser.placement.start.ModeModule`); ``find_problem`` of the
    module ``checked_by``, if any, returns why a device does not support it. ``layout`` is its default worker layout, None
    if it has no workers because the engine is transformers' own. ``laid_out``: users may choose the layout.
    ``one_of_each``: it always has one prefill and one decode worker. ``moves_shares``: it can change shares during a run.
    ``shares_memory``: its workers are processes that share memory.
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
        Mode("mps", "mps", ONE_OF_EACH, laid_out=True, shares_memory=True, needs_gpu=True, checked_by="mps_gpu"),
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
    """Return the mode called ``name``. Raises :class:`~splitwiser.errors.InputError` if there is none."""
    if name not in MODES:
        raise unknown_name("mode", name, MODES)
    return MODES[name]


@dataclass(frozen=True)
class Backend:
    """An engine that modes place.

    ``package`` has the modules ``start`` (:class:`splitwiser.placement.start.ModeModule`), which starts its ``modes``, and
    ``environment``, whose ``check`` says whether it is on this machine. This project's own engine has none, since each mode
    has a module of its own. ``not_taken`` are options that must keep their defaults, with the reason. ``python``:
    it runs in another Python environment. ``copies_kept``: what prefix caching keeps is copied between workers, so
    that it costs something where little is found.
    """

    name: str
    package: str = ""
    modes: tuple[str, ...] = ()
    not_taken: Mapping[str, str] = field(default_factory=dict)
    python: bool = False
    copies_kept: bool = False


_ITS_OWN = "vLLM schedules by itself, first come, first served"
_ALONE = "its engines serve the model alone"
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("hf"),
        Backend(
            "vllm",
            "splitwiser.vllm_backend",
            ("sequential", "mp", "mps"),
            {
                "policy": _ITS_OWN,
                "schedule": "vLLM computes prompts and tokens in one step",
                "adapters": _ALONE,
                "use_adapter": _ALONE,
                "merge_adapter": _ALONE,
                "reserve": "vLLM gives out blocks as requests grow",
                "quantization": "its engines compute in the model's number format",
                "kv_dtype": "its KV cache has the model's number format",
            },
            python=True,
            copies_kept=True,
        ),
    )
}


def find_backend(name: str) -> Backend:
    """Return the back end called ``name``. Raises :class:`~splitwiser.errors.InputError` if there is none."""
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    return BACKENDS[name]
