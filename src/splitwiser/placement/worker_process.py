"""A worker process of modes ``mp`` and ``mps``: what it is given, and what it runs.

The fork server imports this module before the workers start, so importing it must not touch CUDA.
"""

import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from splitwiser import constants
from splitwiser.engine.cuda_graphs import capture_graphs
from splitwiser.engine.messages import Failed, Ready, WorkerSpec
from splitwiser.engine.steps import ModelStepper, warm_up_prefill
from splitwiser.engine.worker import PARENT, build_worker, serve
from splitwiser.machine.process import keep_freed_memory
from splitwiser.machine.shared_memory import SharedMemory, SharedModule
from splitwiser.model.kernels.choose import load_kernels
from splitwiser.model.kv_pool import KVPool, LayerShape
from splitwiser.model.loading import LoadedModel
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.cores import Threads, plan_cores
from splitwiser.placement.mailbox import Mailbox, MailTransport, Pipe
from splitwiser.placement.prepare import scheduling_of
from splitwiser.placement.shares import AutoLevel, Board, Part

HEARTBEAT_S = 0.1  # how often a worker shows that it is alive


@dataclass(frozen=True)
class WorkerSetup:
    """All that a worker process is given as it starts."""

    index: int
    workers: tuple[WorkerSpec, ...]
    model: LoadedModel
    module: SharedModule
    layers: list[LayerShape]
    refused_kernels: tuple[str, ...]
    pool: SharedMemory
    blocks: int
    own_blocks: range
    board: SharedMemory
    config: EngineConfig
    cores: tuple[int, ...]
    thread_levels: list[list[int]]
    environment: dict[str, str]
    inbox: dict[str, Pipe]
    outbox: dict[str, Pipe]

    @property
    def spec(self) -> WorkerSpec:
        """This worker's."""
        return self.workers[self.index]


def worker_main(setup: WorkerSetup) -> None:
    """What a worker process runs."""
    os.environ.update(setup.environment)  # first, as CUDA reads it once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    name = setup.spec.name
    Path("/proc/self/comm").write_text(name, encoding="ascii")  # what ps and top show

    def closed(sender: str) -> None:
        if sender == PARENT:
            os._exit(1)  # nobody is left to answer, whatever step is under way

    transport = MailTransport(Mailbox(setup.inbox, closed), setup.outbox)
    try:
        _run(setup, transport)
    except BaseException as error:
        line = f"{type(error).__name__}: {error}"
        transport.send(PARENT, Failed(name, line, traceback.format_exc()))
        sys.exit(1)


def _run(setup: WorkerSetup, transport: MailTransport) -> None:
    board = Board.over(setup.board.tensor)
    threading.Thread(target=_send_heartbeats, args=(board, setup.index), name="heartbeat", daemon=True).start()
    config = setup.config
    if config.share == "fixed" and not config.lend:
        os.sched_setaffinity(0, plan_cores(setup.workers, setup.cores)[setup.index])  # this thread and those it makes
    part = _make_share(setup, board)
    threads = Threads(part, setup.thread_levels, len(setup.cores), setup.model.device.type == "cpu")
    if setup.model.device.type == "cuda":
        torch.cuda.set_device(setup.model.device)
    else:
        keep_freed_memory()
    module = setup.module.open()
    assert isinstance(module, PreTrainedModel)
    model = replace(setup.model, module=module)
    kernels, _ = load_kernels(config.kernels, model.device, model.dtype, setup.layers)
    kernels = replace(kernels, **dict.fromkeys(setup.refused_kernels))
    pool = KVPool(
        setup.layers, setup.blocks, constants.BLOCK_TOKENS, model.dtype, model.device, setup.pool.tensor, kernels
    )
    spec = setup.spec
    pool.take_first(setup.own_blocks)
    graphs, graphs_described = None, ""
    if spec.role != "prefill":
        graphs, graphs_described = capture_graphs(model, pool, config.max_batch)
    if spec.role != "decode":
        warm_up_prefill(model, pool, config.prefill_tokens)
    stepper = ModelStepper(model, pool, graphs)
    worker = build_worker(
        setup.workers, setup.index, transport, stepper, setup.own_blocks, scheduling_of(config), part.observe
    )
    threads.before_step()
    transport.send(PARENT, Ready(spec.name, graphs_described))
    serve(worker, transport, threads)


def _make_share(setup: WorkerSetup, board: Board) -> Part:
    """The worker's part of the device; the first decode worker moves the level, if it moves."""
    config = setup.config
    names = [worker.role for worker in setup.workers]
    auto = None
    if config.share == "auto" and setup.index == names.index("decode"):
        units = [sum(threads for threads, role in zip(level, names, strict=True) if role == "decode")
                 for level in setup.thread_levels]  # fmt: skip
        auto = AutoLevel(units, board.level, config.itl_target_ms / 1e3)
    prefill = [number for number, role in enumerate(names) if role == "prefill"]
    return Part(board, setup.index, config.lend, auto, prefill)


def _send_heartbeats(board: Board, index: int) -> None:
    while True:
        board.beat(index)
        time.sleep(HEARTBEAT_S)
