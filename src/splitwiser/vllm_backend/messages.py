"""What the parent and the workers of this back end exchange besides :mod:`splitwiser.engine.messages`; never a tensor.

The messages of one request, where prefill and decode are engines of their own: :class:`SubmitPrefill` (parent to prefill)
-> :class:`BlockHandoff` (prefill to decode) -> :class:`BlockReturn` (decode to prefill), and
:class:`~splitwiser.engine.messages.Progress` to the parent as everywhere. A whole engine gets
:class:`~splitwiser.engine.messages.Submit`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitwiser.engine.messages import BackendMessage, Handoff, Ready, Role, WorkerSpec
from splitwiser.request import Request


@dataclass(frozen=True, slots=True)
class SharedFile:
    """An anonymous file of ``nbytes`` bytes that workers map, by its number among the worker's open files."""

    fd: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of every engine. ``longest`` is the number of tokens of its longest request, -1 for as many as the model and
    the KV cache have room for; ``kv_bytes`` is the size of its KV cache, the shared one if there is one. If ``eager``, the
    model is not compiled. With ``prefix_caching``, all engines but those of role decode keep blocks for requests that begin
    alike. ``has_tokenizer``: there is one with the model."""

    model: str
    dtype: str
    longest: int
    max_batch: int
    prefill_tokens: int
    kv_bytes: int
    eager: bool
    seed: int
    eos_token_ids: frozenset[int]
    prefix_caching: bool
    has_tokenizer: bool


@dataclass(frozen=True, slots=True)
class EngineSetup(BackendMessage):
    """The first message to a worker: everything that it needs to know.

    ``receive`` and ``send`` are the pipes to the other workers by name, by their numbers among its open files. ``weights``
    is shared by all engines (None: the engine has its own), ``pool`` by prefill and decode engines. Of the pool's blocks an
    engine owns those from the part ``first`` to the part ``last`` of all. Where each engine has a pool of its own,
    ``sources`` are those of the prefill engines by name, from which decode copies.
    """

    spec: WorkerSpec
    index: int
    options: EngineOptions
    board: SharedFile
    weights: SharedFile | None
    pool: SharedFile | None
    first: float
    last: float
    sources: Mapping[str, SharedFile]
    receive: Mapping[str, int]
    send: Mapping[str, int]

    @property
    def role(self) -> Role:
        """Its role."""
        return self.spec.role


@dataclass(frozen=True, slots=True)
class StartEngine(BackendMessage):
    """Tells a worker to make its engine: one worker after another, since the first one fills the shared weights and two
    engines that start at once see each other's memory as taken."""


@dataclass(frozen=True, slots=True)
class EngineReady(Ready):
    """A worker's engine is ready: it has ``blocks`` blocks of ``block_tokens`` tokens, and takes requests of at most
    ``longest`` tokens. ``settings`` are its resolved ones, for the run's record."""

    blocks: int
    block_tokens: int
    longest: int
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Refused(BackendMessage):
    """An engine cannot serve the model in its role, for ``reason``."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class SubmitPrefill(BackendMessage):
    """A new request for a prefill engine, and the decode worker that it goes on to; it arrived at ``arrival_ns``."""

    request: Request
    arrival_ns: int
    decode_worker: str


@dataclass(frozen=True, slots=True)
class CancelPrefill(BackendMessage):
    """Ends a request of :class:`SubmitPrefill`. A prefill engine that has it no more sends a
    :class:`~splitwiser.engine.messages.Cancel` to the decode worker, behind the request's handoff."""

    request_id: int
    decode_worker: str


@dataclass(frozen=True, slots=True)
class BlockHandoff(BackendMessage):
    """A prefilled request for a decode engine. ``blocks`` are the numbers of the blocks that hold the K and V of its prompt.

    Prefill has leased them to the decode worker: they stay as they are until the :class:`BlockReturn` of ``lease``. The
    first ``kept`` of them prefill keeps, and decode copies them; the others it may take over.
    """

    request: Request
    handoff: Handoff
    lease: str
    blocks: tuple[int, ...]
    kept: int


@dataclass(frozen=True, slots=True)
class BlockReturn(BackendMessage):
    """The end of a lease. ``blocks`` are empty blocks that prefill gets for those that decode has taken over; if there are
    none, decode did not take them, and they are prefill's again."""

    lease: str
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkerGone(BackendMessage):
    """Put into a worker's own inbox: the process of another ``worker`` has ended."""

    worker: str
