"""A worker: the prefill side, the decode side or both, between an inbox and an outbox. It does not know where it runs."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

from splitwiser.engine.decode import Decoder
from splitwiser.engine.messages import Handoff, Message, PrefillTask, Role, StepRecord, Submit, WorkerSpec
from splitwiser.engine.policy import FIRST_COME, Policy
from splitwiser.engine.prefill import Prefiller
from splitwiser.engine.steps import Stepper
from splitwiser.model.kv_pool import BlockAllocator

PARENT = "parent"


class Transport(Protocol):
    """How a worker's messages travel; the only thing that differs between placements."""

    def receive(self) -> Sequence[Message]:
        """What has come since the last call; does not wait."""
        ...

    def send(self, to: str, message: Message) -> None:
        """Send to a worker by name, or to :data:`PARENT`."""
        ...


class Waits(Transport, Protocol):
    """A transport that a worker in a thread or process of its own waits at."""

    stopped: bool

    def wait(self) -> None:
        """Return when there is something to receive."""
        ...


class Lane(Protocol):
    """The part of the device that a worker's steps run on."""

    def turn(self) -> AbstractContextManager[object]:
        """Have the worker's part, and what is lent to it, while this lasts."""
        ...

    def leave(self) -> None:
        """Have no work, and lend the part."""
        ...


class Worker:
    """Steps when there is work. A ``mixed`` worker has both sides and alternates: one prefill step, one decode step."""

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
        self._prefill_workers = cycle(prefill_workers or [name])

    def turn(self) -> bool:
        """Take in what has come and run what is due: at most one prefill and one decode step. Returns whether it ran."""
        for message in self._transport.receive():
            self._take(message)
        ran = False
        if self._decoder:
            for task in self._decoder.admit():
                self._send(next(self._prefill_workers), task)
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
            self._take(message)
        else:
            self._transport.send(to, message)

    def _take(self, message: Message) -> None:
        match message:
            case Submit(request) if self._decoder:
                self._decoder.submit(request)
            case PrefillTask() if self._prefiller:
                self._prefiller.add(message)
            case Handoff() if self._decoder:
                self._decoder.receive(message)
            case _:
                raise TypeError(f"{self.name} ({self.role}) has no use for {message}")


@dataclass(frozen=True)
class Scheduling:
    """What a worker schedules by: the most requests in a decode step, the most prompt tokens in a prefill step, the tokens
    in a block, and the policy."""

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
    scheduling: Scheduling,
    on_itl: Callable[[float], None] = lambda _: None,
) -> Worker:
    """The worker ``specs[index]`` of a layout, with the sides that its role has.

    ``own_blocks`` are the blocks of the pool that it owns if it decodes; ``on_itl`` is told of each gap between two tokens,
    in seconds.
    """
    name, role = specs[index].name, specs[index].role
    prefillers = [spec.name for spec in specs if spec.role == "prefill"]
    turned = index % len(prefillers) if prefillers else 0  # decode workers begin at different prefill workers
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
        prefill_workers=prefillers[turned:] + prefillers[:turned],
    )


def serve(worker: Worker, transport: Waits, lane: Lane) -> None:
    """Turn after turn of ``worker`` on ``lane``, until ``transport`` says to stop."""
    while not transport.stopped:
        with lane.turn():
            ran = worker.turn()
        if not ran and not transport.stopped:
            lane.leave()
            transport.wait()
