"""A worker: the prefill side, the decode side or both, with a transport for its messages.

A worker does not know whether it runs inline, in a thread or in a process.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

from splitwiser.engine.decode import Decoder
from splitwiser.engine.messages import (
    Cancel,
    Drop,
    Dropped,
    Handoff,
    Message,
    PrefillTask,
    Role,
    StepRecord,
    Submit,
    WorkerSpec,
)
from splitwiser.engine.policy import FIRST_COME, Policy
from splitwiser.engine.prefill import Prefiller
from splitwiser.engine.steps import Stepper
from splitwiser.model.kv_pool import BlockAllocator

PARENT = "parent"


class Transport(Protocol):
    """Interface by which a worker receives and sends messages; each placement has its own."""

    def receive(self) -> Sequence[Message]:
        """Return the messages that have arrived since the last call, without waiting."""
        ...

    def send(self, to: str, message: Message) -> None:
        """Send ``message`` to the worker named ``to``, or to :data:`PARENT`."""
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
    """Schedules and runs steps when there is work. A ``mixed`` worker alternates one prefill step and one decode step."""

    def __init__(
        self,
        name: str,
        transport: Transport,
        *,
        prefiller: Prefiller | None = None,
        decoder: Decoder | None = None,
        prefill_workers: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.role: Role = "mixed" if prefiller and decoder else "prefill" if prefiller else "decode"
        self._transport = transport
        self._prefiller = prefiller
        self._decoder = decoder
        self._prefill_workers = prefill_workers or [name]
        self._next_prefill_worker = cycle(self._prefill_workers)

    def step_once(self) -> bool:
        """Handle new messages, then run at most one prefill and one decode step. Returns whether any step ran."""
        for message in self._transport.receive():
            self._handle(message)
        ran = False
        if self._decoder:
            for task in self._decoder.admit():
                self._send(next(self._next_prefill_worker), task)
        if self._prefiller and (prefilled := self._prefiller.step()):
            ran = True
            self._send(
                PARENT,
                StepRecord(
                    self.name, self.role, "prefill",
                    prefilled.start_ns, prefilled.end_ns, prefilled.requests, prefilled.tokens,
                ),
            )  # fmt: skip
            for task, handoff in prefilled.finished:
                self._send(task.decode_worker, handoff)
        if self._decoder and (decoded := self._decoder.step()):
            ran = True
            progress = decoded.progress
            if decoded.requests:
                record = StepRecord(
                    self.name, self.role, "decode",
                    progress.start_ns, progress.time_ns, decoded.requests, decoded.requests,
                )  # fmt: skip
                self._send(PARENT, record)
            self._send(PARENT, progress)
        return ran

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
                    for name in self._prefill_workers:
                        self._send(name, Drop(message.request_id))
            case Drop() if self._prefiller:
                if task := self._prefiller.drop(message.request_id):
                    self._send(task.decode_worker, Dropped(message.request_id))
            case Dropped() if self._decoder:
                self._decoder.receive_dropped(message.request_id)
            case PrefillTask() if self._prefiller:
                self._prefiller.add(message)
            case Handoff() if self._decoder:
                self._decoder.receive(message)
            case _:
                raise TypeError(f"{self.name} ({self.role}) cannot handle {message}")


@dataclass(frozen=True)
class SchedulerSettings:
    """Limits of a worker's steps: requests per decode step, prompt tokens per prefill step and tokens per KV block; and
    its scheduling policy."""

    max_batch: int
    prefill_tokens: int
    block_tokens: int
    policy: Policy = FIRST_COME


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
        name, stepper, allocator, scheduling.block_tokens, scheduling.max_batch, scheduling.policy, on_itl
    )
    return Worker(
        name,
        transport,
        prefiller=None if role == "decode" else prefiller,
        decoder=None if role == "prefill" else decoder,
        prefill_workers=prefillers[first:] + prefillers[:first],
    )


def run_worker(worker: Worker, transport: WaitableTransport, share: DeviceShare) -> None:
    """Run steps of ``worker`` on ``share`` until ``transport`` is stopped; wait while there is no work."""
    while not transport.stopped:
        with share.use():
            ran = worker.step_once()
        if not ran and not transport.stopped:
            share.release()
            transport.wait()
