"""The decode side of a worker: owns KV blocks, admits requests, runs batched decode steps and frees the blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from splitwiser.engine.messages import Handoff, PrefillTask, Progress
from splitwiser.engine.policy import FIRST_COME, Policy, WaitingRequest
from splitwiser.engine.steps import SequenceState, Stepper
from splitwiser.errors import RunError
from splitwiser.model.kv_pool import BlockAllocator
from splitwiser.request import FinishReason, Request


@dataclass(frozen=True)
class DecodeResult:
    """Result of a step for the decode side: the report for the parent, and the number of requests in decode (0: no decode
    step ran)."""

    progress: Progress
    requests: int


class Decoder:
    """Admits requests, at most ``max_batch`` at a time, and decodes them in one batch once they are prefilled.

    All blocks that a request may ever need are reserved at admission, so a running request never waits for another, and
    admission cannot deadlock. ``policy`` gives the order of admission. ``on_itl`` is called with each time between two
    decode steps, in seconds.

    States of a request: waiting -> admitted (blocks reserved, being prefilled) -> running -> finished (blocks freed).
    """

    def __init__(
        self,
        name: str,
        stepper: Stepper,
        allocator: BlockAllocator,
        block_tokens: int,
        max_batch: int,
        policy: Policy = FIRST_COME,
        on_itl: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.name = name
        self._stepper = stepper
        self._allocator = allocator
        self._block_tokens = block_tokens
        self._max_batch = max_batch
        self._policy = policy
        self._waiting: dict[int, WaitingRequest] = {}
        self._admitted: dict[int, SequenceState] = {}
        self._running: dict[int, SequenceState] = {}
        self._handoffs: list[Handoff] = []
        self._finished: list[tuple[int, FinishReason]] = []
        self._on_itl = on_itl
        self._last_end_ns: int | None = None

    def submit(self, request: Request, arrival_ns: int) -> None:
        """Queue a request that arrived at ``arrival_ns`` by the stepper's clock."""
        self._waiting[request.request_id] = WaitingRequest(request, arrival_ns)

    def admit(self) -> list[PrefillTask]:
        """Reserve blocks for as many waiting requests as fit, in the policy's order; return their prefill tasks."""
        tasks: list[PrefillTask] = []
        room = self._max_batch - len(self._admitted) - len(self._running)
        if not self._waiting or not room:  # ordering takes time
            return tasks
        for waiting in islice(self._policy.admission_order(self._waiting.values(), self._stepper.now_ns()), room):
            request = waiting.request
            blocks = self._allocator.allocate(-(-request.max_kv_tokens // self._block_tokens))
            if blocks is None:
                break
            blocks = [*request.adapter.shared_blocks, *blocks]
            self._admitted[request.request_id] = SequenceState(request, blocks)
            tasks.append(PrefillTask(request, tuple(blocks), self.name, waiting.arrival_ns))
        for task in tasks:
            del self._waiting[task.request.request_id]
        return tasks

    @property
    def running(self) -> int:
        """Number of requests that a decode step would have."""
        return len(self._running)

    def receive(self, handoff: Handoff) -> None:
        """Start decoding a prefilled request, unless its first token ends it."""
        sequence = self._admitted.pop(handoff.request_id)
        sequence.token_ids.append(handoff.first_token)
        self._running[handoff.request_id] = sequence
        self._handoffs.append(handoff)
        self._finished += self._collect_finished([handoff.request_id])

    def batch(self) -> list[SequenceState]:
        """Return the requests of the next decode step: all that are running."""
        return list(self._running.values())

    def step(self, *, decodes: bool = True) -> DecodeResult | None:
        """Run one decode step over all running requests, unless ``decodes`` is false, and return :meth:`record`'s result."""
        batch = self.batch() if decodes else []
        start_ns = self._stepper.now_ns()
        tokens = self._stepper.decode(batch) if batch else []
        return self.record(batch, tokens, start_ns, self._stepper.now_ns())

    def record(
        self, batch: Sequence[SequenceState], tokens: Sequence[int], start_ns: int, end_ns: int
    ) -> DecodeResult | None:
        """Take the ``tokens`` that a step from ``start_ns`` to ``end_ns`` made for ``batch``. Returns the result, with all
        that was handed over since the last; None if there is nothing to report. Raises :class:`RunError` if blocks are
        leaked."""
        if not batch and not self._handoffs:
            return None
        for sequence, token in zip(batch, tokens, strict=True):
            sequence.token_ids.append(token)
        ids = [sequence.request.request_id for sequence in batch]
        if batch:
            if self._last_end_ns is not None:
                self._on_itl((end_ns - self._last_end_ns) / 1e9)
            self._finished += self._collect_finished(ids)
            self._last_end_ns = end_ns if self._running else None
        handoffs, self._handoffs = tuple(self._handoffs), []
        finished, self._finished = tuple(self._finished), []
        progress = Progress(self.name, start_ns, end_ns, handoffs, tuple(zip(ids, tokens, strict=True)), finished)
        return DecodeResult(progress, len(batch))

    def _collect_finished(self, request_ids: list[int]) -> list[tuple[int, FinishReason]]:
        """Remove those of ``request_ids`` that have finished, and free their blocks."""
        finished = []
        for request_id in request_ids:
            sequence = self._running[request_id]
            if reason := self._stepper.finish_reason(sequence):
                self._allocator.release(self._running.pop(request_id).own_blocks)
                finished.append((request_id, reason))
        if not self._admitted and not self._running and self._allocator.free_count != self._allocator.count:
            raise RunError(
                f"{self.name}: {self._allocator.count - self._allocator.free_count} blocks are in use, but no request is"
            )
        return finished
