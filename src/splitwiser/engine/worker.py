"""A worker: the prefill side, the decode side or both, with a transport for its messages.

A worker does not know whether it runs inline, in a thread or in a process.
"""

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

from splitwiser.engine.decode import Decoder
from splitwiser.engine.messages import (
    PARENT,
    Cancel,
    Drop,
    Dropped,
    Handoff,
    Message,
    PrefillTask,
    Role,
    StepPhase,
    StepRecord,
    Submit,
    WorkerSpec,
)
from splitwiser.engine.policy import FIRST_COME, Policy
from splitwiser.engine.prefill import Prefiller, PrefillResult, chunks_of
from splitwiser.engine.schedule import ALTERNATE, Schedule, StepTime, Work
from splitwiser.engine.steps import Stepper
from splitwiser.errors import RunError
from splitwiser.model.kv_pool import BlockAllocator

SECOND_LANE_TOKENS = 512  # of a prefill step beside others, which may take long, at low priority


class Transport(Protocol):
    """Interface by which a worker receives and sends messages; each placement has its own."""

    def receive(self) -> Sequence[Message]:
        """Return the messages that have arrived since the last call, without waiting."""
        ...

    def send(self, to: str, message: Message) -> None:
        """Send ``message`` to the worker named ``to``, or to :data:`~splitwiser.engine.messages.PARENT`."""
        ...


class WaitableTransport(Transport, Protocol):
    """A transport that can be waited on, for a worker in its own thread or process; ``stopped`` is set by a
    :class:`~splitwiser.engine.messages.Stop` message."""

    stopped: bool

    def wait(self) -> None:
        """Wait until there is a message to receive."""
        ...


class DeviceShare(Protocol):
    """A worker's share of the device, which its steps run on."""

    def use(self) -> AbstractContextManager[object]:
        """Return a context manager in which steps run on this share, plus whatever idle workers lend."""
        ...

    def release(self) -> None:
        """Mark the worker as idle, so that others may use its share."""
        ...


class Worker:
    """Runs steps when there is work: what next, ``schedule`` decides, which a ``mixed`` worker has a choice in."""

    def __init__(
        self,
        name: str,
        transport: Transport,
        *,
        prefiller: Prefiller | None = None,
        decoder: Decoder | None = None,
        prefill_workers: Sequence[str] = (),
        schedule: Schedule = ALTERNATE,
        itl_target_s: float | None = None,
    ) -> None:
        self.name = name
        self.role: Role = "mixed" if prefiller and decoder else "prefill" if prefiller else "decode"
        self._transport = transport
        self._prefiller = prefiller
        self._decoder = decoder
        self._prefill_workers = cycle(prefill_workers or [name])
        self._prefilling: dict[int, str] = {}  # which worker prefills a request
        self._schedule = schedule
        self._itl_target_s = itl_target_s
        self._last: StepTime | None = None
        self._lock = threading.RLock()  # of prompts and messages, while a second lane runs prefill steps too
        self.on_backlog: Callable[[], None] = lambda: None  # called if a prefill step leaves more than another takes

    def step_once(self) -> bool:
        """Call :meth:`receive` and :meth:`run_planned`."""
        self.receive()
        return self.run_planned()

    def receive(self) -> bool:
        """Handle new messages and admit requests. Returns whether there are prompts or requests in decode to run."""
        with self._lock:
            return self._receive()

    def _receive(self) -> bool:
        """See :meth:`receive`."""
        for message in self._transport.receive():
            self._handle(message)
        if self._decoder:
            for task in self._decoder.admit():
                # a prompt goes to the worker that is still to fill blocks which it shares
                worker = self._prefilling.get(task.follows) if task.follows is not None else None
                worker = self._prefilling[task.request.request_id] = worker or next(self._prefill_workers)
                self._send(worker, task)
        return bool((self._prefiller and self._prefiller.waiting) or (self._decoder and self._decoder.running))

    def run_planned(self) -> bool:
        """Run what the schedule plans: at most one prefill and one decode step, or both in one. Returns whether any step
        ran. Raises :class:`RunError` if the schedule plans nothing and there is work."""
        prefiller, decoder = self._prefiller, self._decoder
        waiting = prefiller.waiting if prefiller else 0
        running = decoder.running if decoder else 0
        budget = prefiller.budget if prefiller else 0
        plan = self._schedule.plan(Work(waiting, running, budget, self._itl_target_s, self._last))
        if (waiting or running) and not (waiting and plan.prefill_tokens) and not (running and plan.decodes):
            raise RunError(
                f"{self.name}: the schedule plans no step while {waiting} prompts wait and {running} requests are in decode"
            )
        if plan.together and prefiller and decoder and self._run_hybrid(prefiller, decoder, plan.prefill_tokens):
            return True
        prefilled = self._run_prefill(plan.prefill_tokens)
        decoded = decoder.step(decodes=plan.decodes) if decoder else None
        if decoded:
            if decoded.requests:
                self._report_step(
                    "decode", decoded.progress.start_ns, decoded.progress.time_ns, decoded=decoded.requests
                )
            self._send(PARENT, decoded.progress)
        if not prefilled and not decoded:  # who is in decode waits for blocks that prompts have
            prefilled = self._run_prefill(budget)
        return bool(prefilled or decoded)

    def run_second_prefill(self) -> bool:
        """Run a prefill step beside another one, in another thread than that, over at most :data:`SECOND_LANE_TOKENS` tokens
        of prompts whose turn is late. Returns whether there were any."""
        budget = self._prefiller.budget if self._prefiller else 0
        return self._run_prefill(min(budget, SECOND_LANE_TOKENS), second_lane=True)

    def _run_prefill(self, budget: int, *, second_lane: bool = False) -> bool:
        """Run a prefill step of at most ``budget`` tokens. Returns whether there were a budget and prompts for it."""
        prefiller = self._prefiller
        if not prefiller or not budget:
            return False
        with self._lock:
            packed = prefiller.take(budget, late=second_lane)
            if prefiller.has_backlog:
                self.on_backlog()
        if not packed:
            return False
        start_ns = prefiller.stepper.now_ns()
        sampled = prefiller.stepper.prefill(chunks_of(packed))
        end_ns = prefiller.stepper.now_ns()
        with self._lock:
            prefilled = prefiller.record(packed, sampled, start_ns, end_ns)
            self._report_step("prefill", start_ns, end_ns, prefilled=prefilled, second_lane=second_lane)
            for task, handoff in prefilled.finished:
                self._send(task.decode_worker, handoff)
        return True

    def _run_hybrid(self, prefiller: Prefiller, decoder: Decoder, budget: int) -> bool:
        """Run a step of at most ``budget`` prompt tokens and of all running requests in one forward. Returns False, and runs
        none, if there are no prompts or no requests for it."""
        packed, batch = prefiller.pack(budget, fill=True), decoder.batch()
        if not packed or not batch:
            return False
        start_ns = prefiller.stepper.now_ns()
        firsts, nexts = prefiller.stepper.hybrid(chunks_of(packed), batch)
        end_ns = prefiller.stepper.now_ns()
        prefilled = prefiller.record(packed, firsts, start_ns, end_ns)
        self._report_step("hybrid", start_ns, end_ns, prefilled=prefilled, decoded=len(batch))
        for task, handoff in prefilled.finished:
            self._send(task.decode_worker, handoff)  # to itself, so that the report below has it
        decoded = decoder.record(batch, nexts, start_ns, end_ns)
        assert decoded is not None
        self._send(PARENT, decoded.progress)
        return True

    def _report_step(
        self,
        phase: StepPhase,
        start_ns: int,
        end_ns: int,
        *,
        prefilled: PrefillResult | None = None,
        decoded: int = 0,
        second_lane: bool = False,
    ) -> None:
        """Tell the parent of a step over the prompts of ``prefilled`` and ``decoded`` requests in decode. Steps of a second
        lane have a name of their own, since they run at the same time as others of the worker."""
        requests, tokens = (prefilled.requests, prefilled.tokens) if prefilled else (0, 0)
        self._last = StepTime(tokens, decoded, (end_ns - start_ns) / 1e9)
        record = StepRecord(
            f"{self.name}-second" if second_lane else self.name,
            self.role,
            phase,
            start_ns,
            end_ns,
            requests + decoded,
            tokens + decoded,
            decoded,
        )
        self._send(PARENT, record)

    def _send(self, to: str, message: Message) -> None:
        if to == self.name:
            self._handle(message)
        else:
            self._transport.send(to, message)

    def _handle(self, message: Message) -> None:
        match message:
            case Submit() if self._decoder:
                self._decoder.submit(message.request, message.arrival_ns)
            case Cancel() if self._decoder:
                if self._decoder.cancel(message.request_id):
                    self._send(self._prefilling[message.request_id], Drop(message.request_id, self.name))
            case Drop() if self._prefiller:
                if task := self._prefiller.drop(message.request_id, message.decode_worker):
                    self._send(task.decode_worker, Dropped(message.request_id))
            case Dropped() if self._decoder:
                del self._prefilling[message.request_id]
                self._decoder.receive_dropped(message.request_id)
            case PrefillTask() if self._prefiller:
                self._prefiller.add(message)
            case Handoff() if self._decoder:
                del self._prefilling[message.request_id]
                self._decoder.receive(message)
            case _:
                raise TypeError(f"{self.name} ({self.role}) cannot handle {message}")


@dataclass(frozen=True)
class SchedulerSettings:
    """Limits of a worker's steps: requests per decode step, tokens per step with prompts and tokens per KV block; its
    scheduling policy and, for a ``mixed`` worker, its schedule and the ITL that this is to keep, in seconds; and how it
    gives out blocks, as :class:`~splitwiser.engine.decode.Decoder` says."""

    max_batch: int
    prefill_tokens: int
    block_tokens: int
    policy: Policy = FIRST_COME
    schedule: Schedule = ALTERNATE
    itl_target_s: float | None = None
    reserve: bool = False
    prefix_caching: bool = False
    longest_shared: float = math.inf


def build_worker(
    specs: Sequence[WorkerSpec],
    index: int,
    transport: Transport,
    stepper: Stepper,
    own_blocks: range,
    scheduling: SchedulerSettings,
    on_itl: Callable[[float], None] = lambda _: None,
) -> Worker:
    """Return the worker ``specs[index]`` of a layout, with the sides that its role needs.

    ``own_blocks`` are the blocks of the pool that it owns if it decodes; ``on_itl`` is called with each time between two
    decode steps, in seconds.
    """
    name, role = specs[index].name, specs[index].role
    prefillers = [spec.name for spec in specs if spec.role == "prefill"]
    first = index % len(prefillers) if prefillers else 0  # decode workers start with different prefill workers
    prefiller = Prefiller(name, stepper, scheduling.prefill_tokens, scheduling.policy)
    allocator = BlockAllocator(own_blocks.start, len(own_blocks))
    decoder = Decoder(
        name,
        stepper,
        allocator,
        scheduling.block_tokens,
        scheduling.max_batch,
        scheduling.policy,
        on_itl,
        reserve=scheduling.reserve,
        prefix_caching=scheduling.prefix_caching,
        longest_shared=scheduling.longest_shared,
    )
    return Worker(
        name,
        transport,
        prefiller=None if role == "decode" else prefiller,
        decoder=None if role == "prefill" else decoder,
        prefill_workers=prefillers[first:] + prefillers[:first],
        schedule=deepcopy(scheduling.schedule) if role == "mixed" else ALTERNATE,
        itl_target_s=scheduling.itl_target_s,
    )


def run_worker(
    worker: Worker, transport: WaitableTransport, share: DeviceShare, pace: Callable[[], None] = lambda: None
) -> None:
    """Run steps of ``worker`` on ``share`` until ``transport`` is stopped; wait while there is no work. ``pace`` waits until
    the worker's next step is due."""
    while not transport.stopped:
        pace()
        # who only hands requests on goes on lending its share: a prefill step that begins meanwhile has it to its end
        with share.use() if worker.receive() else nullcontext():
            ran = worker.run_planned()
        if not ran and not transport.stopped:
            share.release()
            transport.wait()
