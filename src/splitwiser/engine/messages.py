"""Everything that passes between the parent and the workers: small frozen dataclasses, never a tensor.

A request's life in messages: :class:`Submit` (parent to decode) -> :class:`PrefillTask` (decode to prefill) ->
:class:`Handoff` (prefill to decode) -> :class:`Progress` (decode to parent), once a step until it has finished. Each
worker also sends the parent a :class:`StepRecord` a step.
"""

from dataclasses import dataclass
from typing import Literal

from splitwiser.request import FinishReason, Request

Role = Literal["prefill", "decode", "mixed"]
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class WorkerSpec:
    """One worker: its name, such as ``prefill-0``, its role and its share in percent."""

    name: str
    role: Role
    share: float


@dataclass(frozen=True, slots=True)
class Submit:
    """A request for a decode worker to take up."""

    request: Request


@dataclass(frozen=True, slots=True)
class PrefillTask:
    """A prompt to prefill into ``blocks``, which the decode worker ``decode_worker`` has reserved for it and owns:
    prefill writes there until it sends the :class:`Handoff`, decode reads and writes there from then on."""

    request: Request
    blocks: tuple[int, ...]
    decode_worker: str


@dataclass(frozen=True, slots=True)
class Handoff:
    """A prefilled request, given (back) to the decode worker that owns its blocks, with its first token."""

    request_id: int
    first_token: int
    prefill_start_ns: int
    first_token_ns: int
    prefill_worker: str


@dataclass(frozen=True, slots=True)
class Progress:
    """What a decode worker's requests came to: those handed over since the last report, a token of each running one
    (drawn by the step from ``start_ns`` to ``time_ns``), and those that finished."""

    worker: str
    start_ns: int
    time_ns: int
    handoffs: tuple[Handoff, ...]
    tokens: tuple[tuple[int, int], ...]
    finished: tuple[tuple[int, FinishReason], ...]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one worker: a row of ``steps.csv``. ``tokens`` counts the tokens whose K and V it computed."""

    worker: str
    role: Role
    phase: Phase
    start_ns: int
    end_ns: int
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker process is up and waits for work; one that decodes says what it has of CUDA graphs."""

    worker: str
    graphs: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker process ends on an exception: its line, and the traceback for ``--debug``."""

    worker: str
    error: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Stop:
    """A worker process is to end after the step it is in."""


Message = Submit | PrefillTask | Handoff | Progress | StepRecord | Ready | Failed | Stop
