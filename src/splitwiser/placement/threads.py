"""Workers in threads of one process, one thread each, with an inbox for each."""

import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch

from splitwiser.engine.engine import SplitEngine
from splitwiser.engine.messages import PARENT, Cancel, Failed, Stop, Submit
from splitwiser.engine.steps import make_stepper
from splitwiser.engine.worker import DeviceShare, Worker, build_worker, run_worker
from splitwiser.model.loading import LoadedModel
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.mailbox import Inbox, MailPlacement, MailTransport
from splitwiser.placement.prepare import StartedEngine, make_pool, prepare, scheduler_settings
from splitwiser.request import Request

STOP_S = 30.0  # longest that a worker may take to finish its current step


class ThreadPlacement(MailPlacement):
    """Worker threads and their inboxes; see :class:`splitwiser.engine.engine.Placement`."""

    pids: ClassVar[dict[str, int]] = {}

    def __init__(
        self, workers: Sequence[tuple[Worker, MailTransport, DeviceShare]], inboxes: Mapping[str, Inbox]
    ) -> None:
        super().__init__(inboxes[PARENT])
        self._inboxes = inboxes
        self._decode = next(worker.name for worker, _, _ in workers if worker.role != "prefill")
        self._threads = [threading.Thread(target=_run, args=each, name=each[0].name, daemon=True) for each in workers]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request, arrival_ns: int) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.submit`."""
        self._inboxes[self._decode].send(Submit(request, arrival_ns))

    def cancel(self, request_id: int) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.cancel`."""
        self._inboxes[self._decode].send(Cancel(request_id))

    def close(self) -> None:
        """Ask every worker to stop after its current step, and wait for that."""
        for thread in self._threads:
            self._inboxes[thread.name].send(Stop())
        for thread in self._threads:
            thread.join(STOP_S)


def _run(worker: Worker, transport: MailTransport, share: DeviceShare) -> None:
    try:
        run_worker(worker, transport, share)
    except BaseException as error:
        transport.send(PARENT, Failed(worker.name, f"{type(error).__name__}: {error}", traceback.format_exc()))


class Division(Protocol):
    """Interface of a division of the device between workers; ``units`` are those of each worker, by level."""

    units: list[dict[str, int]]

    def streams(self, worker: str) -> "Sequence[torch.cuda.Stream]":
        """Return the streams that steps of ``worker`` may run on; none on a CPU."""
        ...

    def share(self, worker: str) -> DeviceShare:
        """Return the device share of ``worker``."""
        ...

    def observe(self, gap_s: float) -> None:
        """Record a gap between two decode steps, in seconds."""
        ...


def start_threads(model: LoadedModel, config: EngineConfig, division: Division) -> StartedEngine:
    """Start an engine over one prefill and one decode worker in threads, on the shares that ``division`` gives them."""
    specs = sorted(config.specs, key=lambda spec: spec.role != "prefill")
    prefill, decode = specs
    prepared = prepare(model, config)
    pool = make_pool(model, prepared)
    stepper, graphs = make_stepper(
        model,
        pool,
        config.max_batch,
        config.step_tokens,
        {"prefill": division.streams(prefill.name), "decode": division.streams(decode.name)},
    )
    inboxes = {name: Inbox() for name in (prefill.name, decode.name, PARENT)}
    transports = {spec.name: MailTransport(inboxes[spec.name], inboxes) for spec in specs}
    workers = [
        build_worker(
            specs,
            number,
            transports[spec.name],
            stepper,
            range(pool.blocks),
            scheduler_settings(config, model),
            division.observe,
        )
        for number, spec in enumerate(specs)
    ]
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # the workers' streams do not wait for work on other streams
    placement = ThreadPlacement(
        [(worker, transports[worker.name], division.share(worker.name)) for worker in workers], inboxes
    )
    return StartedEngine(
        model,
        SplitEngine(model.decode, placement, pool.blocks * pool.block_tokens),
        pool,
        prepared.described | graphs,
        division.units,
    )
