"""Mode ``sequential``: one mixed worker that runs its steps in the parent's own thread."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar

from splitwiser.engine.engine import SplitEngine
from splitwiser.engine.messages import Cancel, Message, Submit
from splitwiser.engine.steps import make_stepper
from splitwiser.engine.worker import Worker, build_worker
from splitwiser.errors import RunError
from splitwiser.machine.fair_share import OwnThreads
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.prepare import (
    StartedEngine,
    load,
    make_pool,
    measure_budget,
    prepare_alone,
    scheduler_settings,
)
from splitwiser.request import Request


class InlineTransport:
    """The worker's :class:`~splitwiser.engine.worker.Transport`: two queues within one thread."""

    def __init__(self) -> None:
        self.inbox: deque[Message] = deque()
        self.outbox: list[Message] = []

    def receive(self) -> list[Message]:
        """See :meth:`splitwiser.engine.worker.Transport.receive`."""
        messages = list(self.inbox)
        self.inbox.clear()
        return messages

    def send(self, to: str, message: Message) -> None:
        """See :meth:`splitwiser.engine.worker.Transport.send`; the only worker sends only to the parent."""
        self.outbox.append(message)


class InlinePlacement:
    """One worker, which runs a step whenever the engine polls; see :class:`splitwiser.engine.engine.Placement`."""

    pids: ClassVar[dict[str, int]] = {}

    def __init__(self, worker: Worker, transport: InlineTransport, on_cpu: bool = True) -> None:
        self._worker = worker
        self._transport = transport
        self._threads = OwnThreads(on_cpu)
        self._woken = threading.Event()

    def submit(self, request: Request, arrival_ns: int) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.submit`."""
        self._transport.inbox.append(Submit(request, arrival_ns))

    def cancel(self, request_id: int) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.cancel`."""
        self._transport.inbox.append(Cancel(request_id))

    def wake(self) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.wake`."""
        self._woken.set()

    def poll(self, until_ns: int | None) -> Sequence[Message]:
        """See :meth:`splitwiser.engine.engine.Placement.poll`."""
        with self._threads.use():
            ran = self._worker.step_once()
        if not ran:
            self._threads.release()
            if until_ns is None:
                raise RunError(f"{self._worker.name}: requests are waiting, but none can be run")
            self._woken.wait(max(0, until_ns - time.perf_counter_ns()) / 1e9)
        self._woken.clear()
        messages, self._transport.outbox = self._transport.outbox, []
        return messages

    def close(self) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.close`; nothing runs outside this thread."""
        self._threads.release()


def start(config: EngineConfig, _: ExitStack) -> StartedEngine:
    """See :meth:`splitwiser.placement.start.ModeModule.start`: one worker over the whole device and the whole pool."""
    model = load(config)
    prepared = prepare_alone(model, config)
    pool = make_pool(model, prepared)
    transport = InlineTransport()
    stepper, graphs = make_stepper(model, pool, config.max_batch, config.step_tokens, {"prefill": (), "decode": ()})
    budget, measured = measure_budget(config, config.specs[0], stepper)
    settings = replace(scheduler_settings(config, model), prefill_tokens=budget)
    worker = build_worker(config.specs, 0, transport, stepper, range(pool.blocks), settings)
    placement = InlinePlacement(worker, transport, model.device.type == "cpu")
    engine = SplitEngine(model.decode, placement, pool.blocks * pool.block_tokens)
    return StartedEngine(model, engine, pool, prepared.described | graphs | measured, [])
