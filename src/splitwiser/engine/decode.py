"""The decode side of a worker: owns KV blocks, admits requests, runs batched decode steps and frees the blocks."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from splitwiser.engine.messages import Handoff, PrefillTask, Progress
from splitwiser.engine.policy import FIRST_COME, Policy, WaitingRequest
from splitwiser.engine.prefixes import Chain, PrefixCache, may_share
from splitwiser.engine.sampling import Sampled
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

    ``policy`` gives the order of admission. ``on_itl`` is called with each time between two decode steps, in seconds.

    A request takes blocks as it grows. If none is free, the running request that the policy puts last is preempted: it
    gives up its blocks, waits again with the output that it has, and is prefilled with that later. So the first one always
    goes on; and since each prefill gives a token, requests cannot preempt each other for ever. With ``reserve``, and for an
    encoder-decoder, all blocks that a request may ever need are reserved at admission instead, and nobody is preempted.

    Requests that begin alike share the full blocks of their common beginning, if
    :func:`~splitwiser.engine.prefixes.may_share` says so of them; with ``prefix_caching`` also with earlier ones. K and V of
    those that can have more than ``longest_shared`` tokens depend on their own lengths.

    States of a request: waiting -> admitted (has blocks, being prefilled) -> running -> finished (blocks freed), and from
    running back to waiting. One that is cancelled finishes at once, but while it is being prefilled, only once prefill has
    let go of its blocks.
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
        *,
        reserve: bool = False,
        prefix_caching: bool = False,
        longest_shared: float = math.inf,
    ) -> None:
        self.name = name
        self._stepper = stepper
        self._allocator = allocator
        self._block_tokens = block_tokens
        self._max_batch = max_batch
        self._policy = policy
        self._reserve = reserve
        self._shares = partial(may_share, prefix_caching=prefix_caching, longest_shared=longest_shared)
        self._prefixes = PrefixCache(allocator, block_tokens, keeps=prefix_caching)
        self._known: dict[int, WaitingRequest] = {}  # all that have not finished, in order of arrival
        self._waiting: dict[int, WaitingRequest] = {}
        self._admitted: dict[int, SequenceState] = {}
        self._running: dict[int, SequenceState] = {}
        self._chains: dict[int, Chain] = {}  # of those that share blocks
        self._batches = 0
        self._due: dict[int, dict[int, None]] = {}  # before which batch which requests need a block, in order
        self._handoffs: list[Handoff] = []
        self._cancelled: set[int] = set()  # of those admitted
        self._finished: list[tuple[int, FinishReason]] = []  # and not yet reported
        self._on_itl = on_itl
        self._last_end_ns: int | None = None

    def submit(self, request: Request, arrival_ns: int) -> None:
        """Queue a request that arrived at ``arrival_ns`` by the stepper's clock."""
        waiting = WaitingRequest(request, arrival_ns)
        self._known[request.request_id] = self._waiting[request.request_id] = waiting

    def admit(self) -> list[PrefillTask]:
        """Give blocks to as many waiting requests as fit, in the policy's order; return their prefill tasks."""
        tasks: list[PrefillTask] = []
        room = self._max_batch - len(self._admitted) - len(self._running)
        if not self._waiting or not room:  # ordering takes time
            return tasks
        for waiting in islice(self._policy.admission_order(self._waiting.values(), self._stepper.now_ns()), room):
            task = self._admit(waiting)
            if task is None:
                break
            tasks.append(task)
        for task in tasks:
            del self._waiting[task.request.request_id]
        return tasks

    @property
    def running(self) -> int:
        """Number of requests in decode."""
        return len(self._running)

    def _admit(self, waiting: WaitingRequest) -> PrefillTask | None:
        """Return the prefill task of a request with its blocks, None if these are not free."""
        request = waiting.request
        sequence = SequenceState(request, (), list(waiting.token_ids))
        chain = self._prefixes.find(sequence) if self._shares(request) else None
        found = chain.found if chain else []
        tokens = request.max_kv_tokens
        in_flight = len(self._admitted) + len(self._running)
        spare = 0
        if not self._reserve and not request.encoded:
            tokens = min(tokens, request.adapter.tail_tokens + sequence.length + 1)  # the next token has room too
            spare = in_flight  # who is there already goes on for a while before anyone is preempted
        self._allocator.share(found)
        blocks = None
        missing = -(-tokens // self._block_tokens) - len(found)
        if missing + spare <= self._allocator.free_count:
            blocks = self._allocator.allocate(missing)
        if blocks is None:
            self._allocator.release(found)
            return None
        sequence.blocks = [*request.adapter.shared_blocks, *found, *blocks]
        self._admitted[request.request_id] = sequence
        cached, follows = 0, None
        if chain:
            cached, follows = chain.tokens, chain.follows
            self._prefixes.extend(chain, sequence, sequence.length, written=False)
            self._chains[request.request_id] = chain
        return PrefillTask(
            request, tuple(sequence.blocks), self.name, waiting.arrival_ns, tuple(waiting.token_ids), cached, follows
        )

    def cancel(self, request_id: int) -> bool:
        """End a request, if it has not finished. Returns whether it is being prefilled: then the prefill worker is to drop
        it, and it ends when that has, or has handed it over."""
        if sequence := self._admitted.get(request_id):
            self._cancelled.add(request_id)
            if self._chains.pop(request_id, None):
                self._prefixes.forget_unwritten(sequence)  # before anyone who finds them would wait for them
            return True
        if request_id in self._known:
            if not self._waiting.pop(request_id, None):
                self._end(request_id)
            self._end_cancelled(request_id)
        return False

    def receive_dropped(self, request_id: int) -> None:
        """End a cancelled request whose prompt was given up."""
        self._cancelled.discard(request_id)
        self._prefixes.release(self._admitted.pop(request_id))
        self._end_cancelled(request_id)

    def _end_cancelled(self, request_id: int) -> None:
        del self._known[request_id]
        self._finished.append((request_id, "cancelled"))

    def receive(self, handoff: Handoff) -> None:
        """Start decoding a prefilled request, unless it was cancelled meanwhile or its first token ends it."""
        sequence = self._admitted.pop(handoff.request_id)
        if handoff.request_id in self._chains:
            self._prefixes.mark_written(sequence)
        sequence.token_ids.append(handoff.first_token)
        self._running[handoff.request_id] = sequence
        self._expect(sequence, self._batches + self._room(sequence))
        self._handoffs.append(handoff)
        if handoff.request_id in self._cancelled:
            self._cancelled.remove(handoff.request_id)
            self.cancel(handoff.request_id)
        else:
            self._collect_finished([handoff.request_id])

    def batch(self) -> list[SequenceState]:
        """Return the running requests that have room for the K and V of their last token, for a step. They take the blocks
        that they need, for which others may be preempted."""
        due = self._due.pop(self._batches, None)
        self._batches += 1
        if due is None:
            return list(self._running.values())
        left_out = self._give_blocks(due)
        return [sequence for number, sequence in self._running.items() if number not in left_out]

    def _give_blocks(self, due: Collection[int]) -> set[int]:
        """Give a block to each of the requests ``due`` that runs and needs one; return those for which there was none."""
        running, needing = self._running, []
        for number in due:
            if number in running and (room := self._room(running[number])):  # no step followed an earlier batch
                self._expect(running[number], self._batches - 1 + room)
            elif number in running:
                needing.append(number)
        order = needing
        if len(needing) > self._allocator.free_count:
            known = [waiting for number, waiting in self._known.items() if number in running]
            ordered = self._policy.admission_order(known, self._stepper.now_ns())
            order = [waiting.request.request_id for waiting in ordered]
            needing.sort(key=order.index)
        left_out = set()
        for number in needing:
            while not self._allocator.free_count and order[-1] != number and number in running:
                self._preempt(order.pop())
            if number not in running:
                continue
            if self._allocator.free_count:
                self._grow(running[number])
            else:  # it is the last: others will hand over, finish, or take its blocks
                left_out.add(number)
                self._expect(running[number], self._batches)
        return left_out

    def _expect(self, sequence: SequenceState, batch: int) -> None:
        """Look at a running request before the batch number ``batch``, for which it may need a block."""
        self._due.setdefault(batch, {})[sequence.request.request_id] = None

    def _room(self, sequence: SequenceState) -> int:
        """Return for how many more tokens the blocks of a running request have room."""
        request = sequence.request
        slots = (len(sequence.blocks) - len(request.adapter.shared_blocks)) * self._block_tokens
        return slots - request.adapter.tail_tokens - self._stored(sequence)

    def _stored(self, sequence: SequenceState) -> int:
        """Return the number of tokens of a running request whose K and V are stored: all but the last."""
        return sequence.request.prefilled_tokens + sequence.drawn - 1

    def _grow(self, sequence: SequenceState) -> None:
        """Give a running request a block more."""
        blocks = self._allocator.allocate(1)
        assert blocks is not None
        sequence.blocks = [*sequence.blocks, *blocks]  # a new list, by which a step sees that it has changed
        self._expect(sequence, self._batches - 1 + self._block_tokens)
        if chain := self._chains.get(sequence.request.request_id):
            self._prefixes.extend(chain, sequence, self._stored(sequence), written=True)

    def _preempt(self, number: int) -> None:
        """Take its blocks from a running request, and let it wait again, with its output so far."""
        self._known[number].token_ids = self._end(number).token_ids
        self._waiting = {
            other: waiting for other, waiting in self._known.items() if other in self._waiting or other == number
        }

    def _end(self, number: int) -> SequenceState:
        """Remove a request from those that run, free its blocks, and return what it was."""
        sequence = self._running.pop(number)
        if chain := self._chains.pop(number, None):
            self._prefixes.extend(chain, sequence, self._stored(sequence), written=True)
        self._prefixes.release(sequence)
        return sequence

    def step(self, *, decodes: bool = True) -> DecodeResult | None:
        """Run one decode step over :meth:`batch`, unless ``decodes`` is false, and return :meth:`record`'s result."""
        batch = self.batch() if decodes else []
        start_ns = self._stepper.now_ns()
        sampled = self._stepper.decode(batch) if batch else Sampled([])
        return self.record(batch, sampled, start_ns, self._stepper.now_ns())

    def record(
        self, batch: Sequence[SequenceState], sampled: Sampled, start_ns: int, end_ns: int
    ) -> DecodeResult | None:
        """Take what a step from ``start_ns`` to ``end_ns`` has ``sampled`` for ``batch``. Returns the result, with all that
        was handed over or has ended since the last; None if there is nothing to report. Raises :class:`RunError` if blocks
        are leaked."""
        for sequence, token in zip(batch, sampled.tokens, strict=True):
            sequence.token_ids.append(token)
        ids = [sequence.request.request_id for sequence in batch]
        if batch:
            if self._last_end_ns is not None:
                self._on_itl((end_ns - self._last_end_ns) / 1e9)
            self._last_end_ns = end_ns
            self._collect_finished(ids)
        if not self._running:
            self._last_end_ns = None
        if not batch and not self._handoffs and not self._finished:
            return None
        handoffs, self._handoffs = tuple(self._handoffs), []
        finished, self._finished = tuple(self._finished), []
        tokens = tuple(zip(ids, sampled.tokens, strict=True))
        logprobs = tuple((number, each) for number, each in zip(ids, sampled.logprobs, strict=False) if each)
        progress = Progress(self.name, start_ns, end_ns, handoffs, tokens, finished, logprobs)
        return DecodeResult(progress, len(batch))

    def _collect_finished(self, request_ids: list[int]) -> None:
        """Remove those of ``request_ids`` that have finished, and free their blocks. Raises :class:`RunError` if blocks are
        leaked."""
        for request_id in request_ids:
            if reason := self._stepper.finish_reason(self._running[request_id]):
                self._end(request_id)
                del self._known[request_id]
                self._finished.append((request_id, reason))
        if not self._admitted and not self._running and self._allocator.free_count != self._allocator.count:
            raise RunError(
                f"{self.name}: {self._allocator.count - self._allocator.free_count} blocks are in use, but no request is"
            )
