"""Messages between the parent and the workers: small frozen dataclasses, never a tensor.

The messages of one request: :class:`Submit` (parent to decode) -> :class:`PrefillTask` (decode to prefill) ->
:class:`Handoff` (prefill to decode) -> :class:`Progress` (decode to parent), once per decode step
until it has finished. One that is preempted goes through the middle two again. One that is cancelled: :class:`Cancel`
(parent to decode) and, while its prompt is being prefilled, :class:`Drop` (decode to prefill) -> :class:`Dropped`, or a
:class:`Handoff` that was on its way (prefill to decode). Each worker also sends the parent a :class:`StepRecord` per step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from splitwiser.request import FinishReason, Request

PARENT = "parent"  # the name by which workers send to it
Role = Literal["prefill", "decode", "mixed"]
Phase = Literal["prefill", "decode"]
StepPhase = Literal["prefill", "decode", "hybrid"]
"""What a step computes: one of the phases, or both in one forward."""
TokenLogprobs = tuple[tuple[int, float, int], ...]
"""Log-probabilities at one place of a text: token id, log-probability and rank of the token that is there, and of the
likeliest ones. The rank is 1 and as many as there are likelier tokens."""


@dataclass(frozen=True)
class WorkerSpec:
    """One worker: its name, such as ``prefill-0``, its role, and its share of the device's compute in percent."""

    name: str
    role: Role
    share: float


@dataclass(frozen=True, slots=True)
class Submit:
    """A new request for a decode worker, and when it arrived, in nanoseconds of the clock of all workers."""

    request: Request
    arrival_ns: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ends a request, wherever it is; nothing happens if it has finished."""

    request_id: int


@dataclass(frozen=True, slots=True)
class PrefillTask:
    """A prompt to prefill into ``blocks``, which the decode worker ``decode_worker`` owns and has given it, except for the
    first ones that the requests of an adapter share, which nobody writes to. Its request arrived at ``arrival_ns``.

    Prefill writes to the request's own blocks until it sends the :class:`Handoff`; from then on decode reads and writes
    them. It leaves out those that hold the first ``cached_tokens`` tokens: the prefill of another request has filled them
    or, if its number is ``follows``, is to fill them first. A request that was preempted has the output ``token_ids``
    already, which are prefilled with its prompt.
    """

    request: Request
    blocks: tuple[int, ...]
    decode_worker: str
    arrival_ns: int
    token_ids: tuple[int, ...] = ()
    cached_tokens: int = 0
    follows: int | None = None


@dataclass(frozen=True, slots=True)
class Handoff:
    """A prefilled request with its first token, or its next one after a preemption, returned to the decode worker that owns
    its blocks. ``cached_tokens`` are those of its :class:`PrefillTask`. If the request asks for log-probabilities, they are
    those of that token, and of the prompt's tokens from the second on."""

    request_id: int
    first_token: int
    prefill_start_ns: int
    first_token_ns: int
    prefill_worker: str
    cached_tokens: int = 0
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """Tells a prefill worker to give up the prompt of a cancelled request of ``decode_worker``, if it has it, has not
    finished it, and no other prompt waits for what it fills. The next run has requests of the same ids, perhaps of other
    workers."""

    request_id: int
    decode_worker: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """Instead of a :class:`Handoff`: the prompt was given up, and prefill writes no more to its blocks."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Report of a decode worker: requests handed over since the last report, the next token of each running request by
    request id (computed by the step from ``start_ns`` to ``time_ns``), and the requests that finished; by request id too,
    the log-probabilities of the next tokens of those that ask for them."""

    worker: str
    start_ns: int
    time_ns: int
    handoffs: tuple[Handoff, ...]
    tokens: tuple[tuple[int, int], ...]
    finished: tuple[tuple[int, FinishReason], ...]
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one worker, a row of ``steps.csv``. ``tokens`` is the number of tokens whose K and V it computed, of which
    ``decode_tokens`` are of requests in decode."""

    worker: str
    role: Role
    phase: StepPhase
    start_ns: int
    end_ns: int
    requests: int
    tokens: int
    decode_tokens: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker process is ready for work; ``described`` says of its steps what was found at its start, for the run's
    record: their CUDA graphs, and a measured budget."""

    worker: str
    described: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker ended with an exception: its message on one line, and the traceback for ``--debug``."""

    worker: str
    error: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Tells the parent, which waits for reports, that there are requests to cancel."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Tells a worker to end after its current step."""


@dataclass(frozen=True, slots=True)
class BackendMessage:
    """Base class of the messages that only workers of another back end exchange."""


Message = (
    Submit
    | Cancel
    | PrefillTask
    | Handoff
    | Drop
    | Dropped
    | Progress
    | StepRecord
    | Ready
    | Failed
    | Wake
    | Stop
    | BackendMessage
)
