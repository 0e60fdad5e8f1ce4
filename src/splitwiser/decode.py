"""The decode side of a worker: owns blocks, admits requests, batches steps, emits tokens and frees blocks."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitwiser.errors import RunError
from splitwiser.graphs import DecodeGraphs
from splitwiser.kv_pool import BlockAllocator, KVPool
from splitwiser.messages import Handoff, PrefillTask, Progress
from splitwiser.model import LoadedModel
from splitwiser.request import FinishReason, Request
from splitwiser.steps import InFlight, decode_step
from splitwiser.stopping import finish_reason


@dataclass(frozen=True)
class DecodeResult:
    """One turn: the report for the parent, and how many requests its step took (0: none ran)."""

    progress: Progress
    requests: int


class Decoder:
    """A request waits here until ``max_batch`` and its blocks allow, is with prefill until its handoff, then runs.

    All blocks that a request can come to need are reserved when it is admitted, so a running request never waits for
    another, and admission in order of arrival cannot deadlock.

    ``graphs`` replay its steps; ``on_itl`` is told of each gap between two tokens of its requests, in seconds.

    State: waiting -> admitted (blocks reserved, with prefill) -> running -> finished (blocks freed).
    """

    def __init__(
        self,
        name: str,
        model: LoadedModel,
        pool: KVPool,
        allocator: BlockAllocator,
        max_batch: int,
        graphs: DecodeGraphs | None = None,
        on_itl: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.name = name
        self._model = model
        self._pool = pool
        self._allocator = allocator
        self._max_batch = max_batch
        self._waiting: deque[Request] = deque()
        self._admitted: dict[int, InFlight] = {}
        self._running: dict[int, InFlight] = {}
        self._handoffs: list[Handoff] = []
        self._graphs = graphs
        self._on_itl = on_itl
        self._last_end_ns: int | None = None

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def admit(self) -> list[PrefillTask]:
        """Reserve blocks for as many waiting requests as there is room for, in order."""
        tasks = []
        while self._waiting and len(self._admitted) + len(self._running) < self._max_batch:
            request = self._waiting[0]
            blocks = self._allocator.allocate(self._pool.blocks_for(request.most_tokens))
            if blocks is None:
                break
            self._waiting.popleft()
            self._admitted[request.request_id] = InFlight(request, blocks)
            tasks.append(PrefillTask(request, tuple(blocks), self.name))
        return tasks

    def receive(self, handoff: Handoff) -> None:
        """Take a prefilled request over."""
        sequence = self._admitted.pop(handoff.request_id)
        sequence.token_ids.append(handoff.first_token)
        self._running[handoff.request_id] = sequence
        self._handoffs.append(handoff)

    def step(self) -> DecodeResult | None:
        """Run one step of every running request and report, or None if there is nothing to do."""
        handoffs, self._handoffs = tuple(self._handoffs), []
        finished = self._collect([handoff.request_id for handoff in handoffs])  # by the first token alone
        batch = list(self._running.values())
        if not handoffs and not batch:
            return None
        tokens: list[int] = []
        start_ns = self.now_ns()
        if batch:
            tokens = self.run_step(batch)
            for sequence, token in zip(batch, tokens, strict=True):
                sequence.token_ids.append(token)
        end_ns = self.now_ns()
        if self._last_end_ns is not None:
            self._on_itl((end_ns - self._last_end_ns) / 1e9)
        ids = [sequence.request.request_id for sequence in batch]
        finished += self._collect(ids)
        self._last_end_ns = end_ns if self._running else None
        progress = Progress(
            self.name, start_ns, end_ns, handoffs, tuple(zip(ids, tokens, strict=True)), tuple(finished)
        )
        return DecodeResult(progress, len(batch))

    def run_step(self, batch: Sequence[InFlight]) -> list[int]:
        """The step itself: the next token of each request. A simulation has its own."""
        return decode_step(self._model, self._pool, batch, self._graphs)

    def now_ns(self) -> int:
        """The clock that steps are timed by."""
        return time.perf_counter_ns()

    def _collect(self, request_ids: list[int]) -> list[tuple[int, FinishReason]]:
        finished = []
        for request_id in request_ids:
            sequence = self._running[request_id]
            reason = finish_reason(sequence.params, sequence.token_ids, self._model.eos_token_ids, self._model.decode)
            if reason:
                self._allocator.release(self._running.pop(request_id).blocks)
                finished.append((request_id, reason))
        if not self._admitted and not self._running and self._allocator.free_count != self._allocator.count:
            raise RunError(
                f"{self.name}: {self._allocator.count - self._allocator.free_count} blocks in use with no request in them"
            )
        return finished
