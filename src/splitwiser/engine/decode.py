"""The decode side of a worker: owns KV blocks, admits requests, runs batched decode steps and frees the blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from splitwiser.engine.messages import Handoff, PrefillTask, Progress
from splitwiser.engine.policy import FIRST_COME, Policy, WaitingRequest
from splitwiser.engine.sampling import Sampled
from splitwiser.engine.steps import SequenceState, Stepper
from splitwiser.errors import RunError
from splitwiser.model.kv_pool import BlockAllocator
from splitwiser.request import FinishReason, Request


@dataclass(frozen=True)
class DecodeResult:
    """Result of :meth:`Decoder.step`: the report for the parent, and the batch size of its decode step (0: none ran)."""

    progress: Progress
    requests: int


class Decoder:
    """Admits requests, at most ``max_batch`` at a time, and decodes them in one batch once they are prefilled.

    All blocks that a request may ever need are reserved at admission, so a running request never waits for another, and
    admission cannot deadlock. ``policy`` gives the order of admission. ``on_itl`` is called with each time between two
    decode steps, in seconds.

    States of a request: waiting -> admitted (blocks reserved, being prefilled) -> running -> finished (blocks freed). One
    that is cancelled finishes at once, but while it is being prefilled, only once prefill has let go of its blocks.
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
        self._cancelled: set[int] = set()  # of those admitted
        self._ended: list[int] = []  # cancelled, and not yet reported
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

    def cancel(self, request_id: int) -> bool:
        """End a request, if it has not finished. Returns whether it is being prefilled: then the prefill workers are to drop
        it, and it ends when one has, or has handed it over."""
        if request_id in self._admitted:
            self._cancelled.add(request_id)
            return True
        if self._waiting.pop(request_id, None):
            self._ended.append(request_id)
        elif sequence := self._running.pop(request_id, None):
            self._end_cancelled(sequence)
        return False

    def receive_dropped(self, request_id: int) -> None:
        """End a cancelled request whose prompt was given up."""
        self._cancelled.discard(request_id)
        self._end_cancelled(self._admitted.pop(request_id))

    def _end_cancelled(self, sequence: SequenceState) -> None:
        self._allocator.release(sequence.own_blocks)
        self._ended.append(sequence.request.request_id)

    def receive(self, handoff: Handoff) -> None:
        """Start decoding a prefilled request, or end it if it was cancelled meanwhile."""
        sequence = self._admitted.pop(handoff.request_id)
        sequence.token_ids.append(handoff.first_token)
        self._running[handoff.request_id] = sequence
        self._handoffs.append(handoff)
        if handoff.request_id in self._cancelled:
            self._cancelled.remove(handoff.request_id)
            self.cancel(handoff.request_id)

    def step(self) -> DecodeResult | None:
        """Run one decode step over all running requests and return its result, or None if there is nothing to do. Raises
        :class:`RunError` if blocks are leaked."""
        handoffs, self._handoffs = tuple(self._handoffs), []
        finished = self._collect_finished([handoff.request_id for handoff in handoffs])  # with their first token
        finished += [(request_id, "cancelled") for request_id in self._ended]
        self._ended.clear()
        batch = list(self._running.values())
        if not finished and not handoffs and not batch:
            return None
        sampled = Sampled([])
        start_ns = self._stepper.now_ns()
        if batch:
            sampled = self._stepper.decode(batch)
            for sequence, token in zip(batch, sampled.tokens, strict=True):
                sequence.token_ids.append(token)
        end_ns = self._stepper.now_ns()
        if batch and self._last_end_ns is not None:
            self._on_itl((end_ns - self._last_end_ns) / 1e9)
        ids = [sequence.request.request_id for sequence in batch]
        finished += self._collect_finished(ids)
        self._last_end_ns = end_ns if self._running else None
        tokens = tuple(zip(ids, sampled.tokens, strict=True))
        logprobs = tuple((number, each) for number, each in zip(ids, sampled.logprobs, strict=False) if each)
        progress = Progress(self.name, start_ns, end_ns, handoffs, tokens, tuple(finished), logprobs)
        return DecodeResult(progress, len(batch))

    def _collect_finished(self, request_ids: list[int]) -> list[tuple[int, FinishReason]]:
        """Remove those of ``request_ids`` that have finished, and free their blocks."""
        finished: list[tuple[int, FinishReason]] = []
        for request_id in request_ids:
            sequence = self._running.get(request_id)  # None if it was cancelled at its handoff
            if sequence and (reason := self._stepper.finish_reason(sequence)):
                self._allocator.release(self._running.pop(request_id).own_blocks)
                finished.append((request_id, reason))
        if not self._admitted and not self._running and self._allocator.free_count != self._allocator.count:
            raise RunError(
                f"{self.name}: {self._allocator.count - self._allocator.free_count} blocks are in use, but no request is"
            )
        return finished
