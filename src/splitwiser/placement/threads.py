"""Workers as lanes of one process: a thread each, with letterboxes between them."""

import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch

from splitwiser.engine.cuda_graphs import capture_graphs
from splitwiser.engine.engine import SplitEngine
from splitwiser.engine.messages import Failed, Stop, Submit
from splitwiser.engine.steps import ModelStepper, warm_up_prefill
from splitwiser.engine.worker import PARENT, Lane, Worker, build_worker, serve
from splitwiser.model.loading import LoadedModel
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.mailbox import Letterbox, MailPlacement, MailTransport
from splitwiser.placement.prepare import Started, make_pool, prepare, scheduling_of
from splitwiser.request import Request

STOP_S = 30.0  # longest that a lane may take to end: the step it is in


class LanePlacement(MailPlacement):
    """Threads and the letterboxes to them; see :class:`splitwiser.engine.engine.Placement`."""

    pids: ClassVar[dict[str, int]] = {}

    def __init__(self, workers: Sequence[tuple[Worker, MailTransport, Lane]], boxes: Mapping[str, Letterbox]) -> None:
        super().__init__(boxes[PARENT])
        self._boxes = boxes
        self._decode = next(worker.name for worker, _, _ in workers if worker.role != "prefill")
        self._threads = [threading.Thread(target=_run, args=each, name=each[0].name, daemon=True) for each in workers]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.submit`."""
        self._boxes[self._decode].send(Submit(request))

    def close(self) -> None:
        """Ask every lane to stop after its step, and wait."""
        for thread in self._threads:
            self._boxes[thread.name].send(Stop())
        for thread in self._threads:
            thread.join(STOP_S)


def _run(worker: Worker, transport: MailTransport, lane: Lane) -> None:
    try:
        serve(worker, transport, lane)
    except BaseException as error:
        transport.send(PARENT, Failed(worker.name, f"{type(error).__name__}: {error}", traceback.format_exc()))


class Division(Protocol):
    """How the device is divided between the lanes."""

    units: list[dict[str, int]]

    def streams(self, worker: str) -> "Sequence[torch.cuda.Stream]":
        """The streams that steps of ``worker`` may run on; none on a CPU."""
        ...

    def lane(self, worker: str) -> Lane:
        """The part of ``worker``."""
        ...

    def observe(self, gap_s: float) -> None:
        """Hear of a gap between two tokens of a request."""
        ...


def start_lanes(model: LoadedModel, config: EngineConfig, division: Division) -> Started:
    """Start an engine over one prefill and one decode lane on the parts that ``division`` gives them."""
    specs = sorted(config.specs, key=lambda spec: spec.role != "prefill")
    prefill, decode = specs
    prepared = prepare(model, config)
    pool = make_pool(model, prepared)
    graphs, graphs_described = capture_graphs(model, pool, config.max_batch, division.streams(decode.name))
    warm_up_prefill(model, pool, config.prefill_tokens, division.streams(prefill.name))
    boxes = {name: Letterbox() for name in (prefill.name, decode.name, PARENT)}
    transports = {spec.name: MailTransport(boxes[spec.name], boxes) for spec in specs}
    stepper = ModelStepper(model, pool, graphs)
    workers = [
        build_worker(
            specs, number, transports[spec.name], stepper, range(pool.blocks), scheduling_of(config), division.observe
        )
        for number, spec in enumerate(specs)
    ]
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # the lanes' streams wait for nothing that was begun on another
    placement = LanePlacement(
        [(worker, transports[worker.name], division.lane(worker.name)) for worker in workers], boxes
    )
    return Started(
        model,
        SplitEngine(model, placement, pool.blocks * pool.block_tokens),
        pool,
        {**prepared.described, "decode_graphs": graphs_described},
        division.units,
    )
