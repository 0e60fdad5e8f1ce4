"""The worker processes of modes ``mp`` and ``mps``: their setup and their main function.

The fork server imports this module before the workers start, so importing it must not initialise CUDA.
"""

import os
import signal
import threading
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from transformers import PreTrainedModel

from splitwiser import constants
from splitwiser.engine.messages import PARENT, Failed, Phase, Ready, WorkerSpec
from splitwiser.engine.steps import make_stepper
from splitwiser.engine.worker import build_worker, run_worker
from splitwiser.machine.pages import keep_freed_memory
from splitwiser.machine.shared_memory import SharedMemory, SharedModule
from splitwiser.model.kernels.choose import load_kernels
from splitwiser.model.kernels.interface import LayerShape
from splitwiser.model.kv_pool import KVPool, stored_dtype
from splitwiser.model.loading import LoadedModel
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.cores import CpuShare, Pace, SecondLane, plan_cores
from splitwiser.placement.mailbox import MailTransport, Pipe, PipeInbox
from splitwiser.placement.prepare import measure_budget, scheduler_settings, takes_second_lane
from splitwiser.placement.shares import AutoLevel, Board, WorkerShare

HEARTBEAT_S = 0.1  # how often a worker shows that it is alive


@dataclass(frozen=True)
class WorkerSetup:
    """Everything that a worker process receives at its start."""

    index: int
    model: LoadedModel
    module: SharedModule
    layers: list[LayerShape]
    refused_kernels: tuple[str, ...]
    pool: SharedMemory
    blocks: int
    shared_blocks: int
    own_blocks: range
    board: SharedMemory
    config: EngineConfig
    cores: tuple[int, ...]
    thread_levels: list[list[int]]
    environment: dict[str, str]
    receive_ends: dict[str, Pipe]
    send_ends: dict[str, Pipe]

    @property
    def spec(self) -> WorkerSpec:
        """Name, role and share of this worker."""
        return self.config.specs[self.index]


def worker_main(setup: WorkerSetup) -> None:
    """Main function of a worker process."""
    os.environ.update(setup.environment)  # first, since CUDA reads it only once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
    name = setup.spec.name
    Path("/proc/self/comm").write_text(name, encoding="ascii")  # the name that ps and top show

    def closed(sender: str) -> None:
        if sender == PARENT:
            os._exit(1)  # the parent has ended; stop at once, even in the middle of a step

    transport = MailTransport(PipeInbox(setup.receive_ends, closed), setup.send_ends)
    try:
        _run(setup, transport)
    except BaseException as error:
        _fail(setup, transport, error)


def _fail(setup: WorkerSetup, transport: MailTransport, error: BaseException) -> NoReturn:
    """Report the ``error`` that is handled now, and end the process."""
    line = f"{type(error).__name__}: {error}"
    transport.send(PARENT, Failed(setup.spec.name, line, traceback.format_exc()))
    os._exit(1)  # from whichever thread


def _run(setup: WorkerSetup, transport: MailTransport) -> None:
    """Set up the model over the shared memory, report that the worker is ready, and run it until it is stopped."""
    board = Board.over(setup.board.tensor)
    threading.Thread(target=_send_heartbeats, args=(board, setup.index), name="heartbeat", daemon=True).start()
    config = setup.config
    if config.share == "fixed" and not config.lend:
        os.sched_setaffinity(
            0, plan_cores(config.specs, setup.cores)[setup.index]
        )  # this thread and those that it starts
    share = _make_share(setup, board)
    cpu_share = CpuShare(share, setup.thread_levels, len(setup.cores), setup.model.device.type == "cpu")
    if setup.model.device.type == "cuda":
        torch.cuda.set_device(setup.model.device)
    else:
        keep_freed_memory()
    module = setup.module.open()
    assert isinstance(module, PreTrainedModel)
    model = replace(setup.model, module=module)
    stored = stored_dtype(config.kv_dtype, model.dtype)
    kernels, _ = load_kernels(config.kernels, model.device, stored, setup.layers)
    kernels = replace(kernels, **dict.fromkeys(setup.refused_kernels))
    pool = KVPool(
        setup.layers,
        setup.blocks,
        constants.BLOCK_TOKENS,
        stored,
        model.device,
        setup.pool.tensor,
        kernels,
        setup.shared_blocks,
    )
    spec = setup.spec
    phases: list[Phase] = ["prefill", "decode"] if spec.role == "mixed" else [spec.role]
    stepper, graphs = make_stepper(model, pool, config.max_batch, config.step_tokens, dict.fromkeys(phases, ()))
    cpu_share.before_step()
    budget, measured = measure_budget(config, spec, stepper)
    worker = build_worker(
        config.specs,
        setup.index,
        transport,
        stepper,
        setup.own_blocks,
        replace(scheduler_settings(config, model), prefill_tokens=budget),
        share.observe,
    )
    described = graphs | measured
    has_second_lane = config.has_second_lane and takes_second_lane(model)
    if has_second_lane and spec.role == "prefill":
        threads = max(1, len(setup.cores) - setup.thread_levels[0][setup.index])
        lane = SecondLane(worker.run_second_prefill, board, threads, partial(_fail, setup, transport))
        worker.on_backlog = lane.open
        described["second_lane"] = (
            f"{threads} of prefill's threads, while more prompt tokens wait than a step takes; decode then has a step every "
            f"{config.kept_itl_s * 1e3:g} ms"
        )
    transport.send(PARENT, Ready(spec.name, described))
    paced = has_second_lane and spec.role == "decode"
    run_worker(worker, transport, cpu_share, Pace(board, config.kept_itl_s if paced else 0).wait)


def _make_share(setup: WorkerSetup, board: Board) -> WorkerShare:
    """Return the worker's share of the device; with share auto, the first decode worker changes the level."""
    config = setup.config
    roles = [worker.role for worker in config.specs]
    auto = None
    if config.share == "auto" and setup.index == roles.index("decode"):
        units = [sum(threads for threads, role in zip(level, roles, strict=True) if role == "decode")
                 for level in setup.thread_levels]  # fmt: skip
        auto = AutoLevel(units, board.level, config.kept_itl_s)
    prefill = [number for number, role in enumerate(roles) if role == "prefill"]
    return WorkerShare(board, setup.index, config.lend, auto, prefill)


def _send_heartbeats(board: Board, index: int) -> None:
    while True:
        board.add_heartbeat(index)
        time.sleep(HEARTBEAT_S)
