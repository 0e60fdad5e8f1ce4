"""Modes ``mp`` and ``mps``: worker processes that share one copy of the weights and one KV pool.

The parent loads the model, moves its weights to shared memory, creates the pool there and starts the workers; tensors are
never sent again. From then on the parent only submits requests, collects results and supervises the workers.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

import psutil
import torch
import torch.multiprocessing
from tqdm import tqdm

from splitwiser import constants
from splitwiser.engine.engine import SplitEngine
from splitwiser.engine.messages import Cancel, Message, Progress, Ready, Stop, Submit
from splitwiser.engine.policy import Router
from splitwiser.engine.prefixes import may_share
from splitwiser.errors import InputError, RunError, WorkerLostError
from splitwiser.machine.process import uninterrupted
from splitwiser.machine.shared_memory import SharedMemory, SharedModule
from splitwiser.model.kv_pool import block_nbytes
from splitwiser.placement.checks import refuse_mode_here
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.cores import plan_levels
from splitwiser.placement.mailbox import CHECK_S, MailPlacement, Pipe, PipeInbox, open_pipes
from splitwiser.placement.mps_daemon import MpsDaemon
from splitwiser.placement.prepare import StartedEngine, load, make_pool, prepare, takes_second_lane
from splitwiser.placement.shares import Board
from splitwiser.placement.start import start_fork_server
from splitwiser.placement.worker_process import WorkerSetup, worker_main
from splitwiser.request import Request

MOST_WORKERS = 120  # the fork server passes at most 256 open files to a worker, which has two for every other
MISSED_CHECKS = 4  # consecutive checks without a heartbeat after which a worker counts as lost
START_S = 300.0  # longest that a start may take until the next worker is ready
STOP_S = 5.0  # longest that they may take to stop by themselves

# forkserver, because a process that has initialised CUDA must not fork, and a child forked after OpenMP has run hangs; and
# spawn would import torch and transformers again in every worker, which takes seconds and memory. The fork server imports
# them once and uses neither CUDA nor OpenMP: workers start in milliseconds and share its pages. The cost is one more
# process, which ends with the parent.
_context = torch.multiprocessing.get_context("forkserver")


class WorkerProcess(Protocol):
    """Interface of a worker's process, as of ``multiprocessing``."""

    name: str

    @property
    def pid(self) -> int | None:
        """Its process id; None before it has started."""
        ...

    @property
    def exitcode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most ``timeout`` seconds."""
        ...

    def terminate(self) -> None:
        """Ask it to end; does nothing if it has ended."""
        ...

    def kill(self) -> None:
        """End it; does nothing if it has ended."""
        ...


class SupervisedPlacement(MailPlacement):
    """Started worker ``processes``, with a heartbeat each on ``board`` in the same order; ``send_ends`` are the pipes to
    them by name, and ``inbox`` receives what they send. See :class:`splitwiser.engine.engine.Placement`."""

    def __init__(
        self, processes: Sequence[WorkerProcess], send_ends: Mapping[str, Pipe], inbox: PipeInbox, board: Board
    ) -> None:
        super().__init__(inbox)
        self._pipe_inbox = inbox
        self._processes = processes
        self._send_ends = send_ends
        self._board = board
        self._heartbeats = board.heartbeats()
        self._missed_checks = [0] * len(processes)
        self._next_check_s = 0.0
        self._ready: set[str] = set()

    @property
    def pids(self) -> dict[str, int]:
        """See :attr:`splitwiser.engine.engine.Placement.pids`."""
        return {process.name: process.pid or 0 for process in self._processes}

    def wait_ready(self) -> None:
        """Wait until every worker is ready; shows a progress bar on a terminal.

        Raises :class:`RunError` after :data:`START_S`, :class:`WorkerLostError` if a worker was lost."""
        deadline = time.monotonic() + START_S
        waiting = {process.name for process in self._processes}
        with tqdm(total=len(waiting), desc="workers ready", unit="worker", disable=None, leave=False) as bar:
            while waiting:
                for message in self.poll(time.perf_counter_ns() + int(CHECK_S * 1e9)):
                    if isinstance(message, Ready):
                        self._handle_ready(message)
                        waiting.discard(message.worker)
                        self._ready.add(message.worker)
                        bar.update(1)
                        deadline = time.monotonic() + START_S
                if time.monotonic() > deadline:
                    raise RunError(f"workers {', '.join(sorted(waiting))} were not ready after {START_S:.0f} s")

    @uninterrupted()
    def close(self) -> None:
        """End every worker."""
        self._end(self._processes)
        for pipe in self._send_ends.values():
            pipe.close()

    def _end(self, processes: Sequence[WorkerProcess]) -> None:
        """Ask ``processes`` to stop after their current step, wait, and terminate or kill those that do not."""
        for process in processes:
            self._send(process.name, Stop())
        _join(processes, STOP_S)
        for process in processes:
            process.terminate()
        _join(processes, 1.0)
        for process in processes:
            process.kill()
        _join(processes, 1.0)

    def _handle_ready(self, message: Ready) -> None:
        """Process what a worker says when it is ready."""

    def _find_fault(self) -> str | None:
        """Return what else has gone wrong that ends the run, or None."""
        return None

    def _send(self, worker: str, message: Message) -> None:
        with suppress(OSError):  # the worker has died; the next poll raises that
            self._send_ends[worker].send(message)

    def _find_lost_worker(self) -> WorkerLostError | None:
        for process in self._processes:
            if process.exitcode is not None:
                self._pipe_inbox.wait_until_closed(process.name, CHECK_S)
                how = _describe_exit(process.exitcode)
                return WorkerLostError(f"worker {process.name} (process {process.pid}) {how}")
        if time.monotonic() < self._next_check_s:
            return None
        self._next_check_s = time.monotonic() + CHECK_S
        if fault := self._find_fault():
            return WorkerLostError(fault)
        heartbeats = self._board.heartbeats()
        for number, (now, before) in enumerate(zip(heartbeats, self._heartbeats, strict=True)):
            # counted in checks, not in seconds: when the whole machine stood still, no checks ran either. Not counted before
            # a worker is ready: initialising CUDA holds the interpreter lock, for seconds if several start at once
            silent = now == before and self._processes[number].name in self._ready
            self._missed_checks[number] = self._missed_checks[number] + 1 if silent else 0
        self._heartbeats = heartbeats
        for process, missed in zip(self._processes, self._missed_checks, strict=True):
            if missed >= MISSED_CHECKS:
                state = _process_state(process.pid)
                return WorkerLostError(f"worker {process.name} (process {process.pid}, {state}) does not answer")
        return None


class ProcessPlacement(SupervisedPlacement):
    """Worker processes and the pipes to them; see :class:`splitwiser.engine.engine.Placement`."""

    def __init__(
        self, setups: Sequence[WorkerSetup], parent_ends: dict[str, tuple[Pipe, Pipe]], daemon: MpsDaemon | None
    ) -> None:
        self._daemon = daemon
        self._shared = [*setups[0].module.memories, setups[0].pool]
        self.described: dict[str, str] = {}  # what the workers found of their steps, for the run's record
        blocks = {setup.spec.name: len(setup.own_blocks) for setup in setups if setup.spec.role != "prefill"}
        shares = partial(may_share, prefix_caching=bool(setups[0].config.prefix_caching))
        self._router = Router(blocks, constants.BLOCK_TOKENS, shares)
        with _without_main_import():
            processes = [
                _context.Process(target=worker_main, args=(setup,), name=setup.spec.name, daemon=True)
                for setup in setups
            ]
            for process in processes:
                process.start()
        for setup in setups:  # a pipe closes only when all copies of an end are closed, and the workers have their own
            for pipe in [*setup.receive_ends.values(), *setup.send_ends.values()]:
                pipe.close()
        inbox = PipeInbox(
            {name: from_worker for name, (_, from_worker) in parent_ends.items()}, on_closed=lambda _: None
        )
        send_ends = {name: to_worker for name, (to_worker, _) in parent_ends.items()}
        super().__init__(processes, send_ends, inbox, Board.over(setups[0].board.tensor))

    def wait_ready(self) -> None:
        """See :meth:`SupervisedPlacement.wait_ready`; with an MPS daemon, every worker is then its client."""
        super().wait_ready()
        if self._daemon:
            self._daemon.wait_for_clients(self.pids)

    def submit(self, request: Request, arrival_ns: int) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.submit`: to the decode worker that the router chooses."""
        self._send(self._router.choose(request), Submit(request, arrival_ns))

    def cancel(self, request_id: int) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.cancel`."""
        self._send(self._router.owner(request_id), Cancel(request_id))

    @uninterrupted()
    def close(self) -> None:
        """See :meth:`SupervisedPlacement.close`."""
        super().close()
        for memory in self._shared:
            memory.forget_receivers()

    def _handle(self, message: Message) -> None:
        if isinstance(message, Progress):
            for request_id, _ in message.finished:
                self._router.release(request_id)

    def _handle_ready(self, message: Ready) -> None:
        self.described |= message.described

    def _find_fault(self) -> str | None:
        return self._daemon.find_fault() if self._daemon else None


def _join(processes: Sequence[WorkerProcess], timeout_s: float) -> None:
    """Wait until all ``processes`` have ended, at most ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


def _describe_exit(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    return f"was killed by {signal.Signals(-exitcode).name}"


def _process_state(pid: int | None) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.Error:
        return "gone"


def start(config: EngineConfig, _: ExitStack) -> StartedEngine:
    """See :meth:`splitwiser.placement.start.ModeModule.start`."""
    refuse_mode_here(config.mode, config.device_name)
    return start_workers(config, config.device_name)


def start_workers(config: EngineConfig, device: str, daemon: MpsDaemon | None = None) -> StartedEngine:
    """Load the model onto ``device``, start an engine over worker processes and return when all workers are ready.

    Every decode or mixed worker owns an equal part of the pool's blocks. With ``daemon``, the workers are its clients.
    Raises :class:`InputError` for a configuration that does not fit the device, :class:`RunError` if the start fails.
    """
    _check_count(len(config.specs))
    start_fork_server()
    model = load(config, device)
    if model.device.type == "cuda" and config.share == "auto":
        raise InputError("--share auto in mode mp divides a CPU's cores, and the device is a GPU; use mode green")
    if config.itl_target_ms is not None and config.has_second_lane and not takes_second_lane(model):
        raise InputError(
            f"--itl_target_ms {config.itl_target_ms:g} in mode mp is for decoders without rotary scaling by length on a "
            "CPU; with others, use --share auto, on a GPU in mode green"
        )
    prepared = prepare(model, config)
    layers, blocks = prepared.layers, prepared.blocks
    specs = config.specs
    owners = [number for number, spec in enumerate(specs) if spec.role != "prefill"]
    block_tokens = constants.BLOCK_TOKENS
    part = blocks // len(owners)
    if not part:
        raise InputError(
            f"--kv_memory '{config.kv_memory}' holds {blocks} blocks, which is less than one for each decode worker"
        )
    module = SharedModule(model.module, model.device)
    pool_memory = SharedMemory(
        block_nbytes(layers, block_tokens, prepared.stored) * (blocks + prepared.shared_blocks), model.device
    )
    board = SharedMemory(Board.nbytes(len(specs)), torch.device("cpu"))
    cores = tuple(sorted(os.sched_getaffinity(0)))
    thread_levels = plan_levels(specs, len(cores), config.share)
    Board.over(board.tensor).level = len(thread_levels) // 2
    receive_ends, send_ends, parent_ends = open_pipes([spec.name for spec in specs])
    setups = [
        WorkerSetup(
            index=number,
            model=replace(model, module=None),  # type: ignore[arg-type]  # it travels as shared memory
            module=module,
            layers=layers,
            refused_kernels=prepared.refused_kernels,
            pool=pool_memory,
            blocks=blocks,
            shared_blocks=prepared.shared_blocks,
            own_blocks=range(owners.index(number) * part, (owners.index(number) + 1) * part)
            if number in owners
            else range(0),
            board=board,
            config=config,
            cores=cores,
            thread_levels=thread_levels,
            environment=daemon.worker_environment(spec, config) if daemon else {},
            receive_ends=receive_ends[spec.name],
            send_ends=send_ends[spec.name],
        )
        for number, spec in enumerate(specs)
    ]
    placement = ProcessPlacement(setups, parent_ends, daemon)
    try:
        placement.wait_ready()
    except BaseException:
        placement.close()
        raise
    finally:
        for memory in (*module.memories, pool_memory, board):
            memory.close()
    pool = make_pool(model, prepared, pool_memory.tensor)
    return StartedEngine(
        model,
        SplitEngine(model.decode, placement, part * block_tokens),
        pool,
        prepared.described | placement.described,
        [dict(zip([spec.name for spec in specs], threads, strict=True)) for threads in thread_levels]
        if model.device.type == "cpu"
        else [],
    )


def _check_count(workers: int) -> None:
    """Raise :class:`InputError` for more workers than can have pipes to each other."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # both ends of a pipe each way between any two, the parent included; other files take fewer than 100
    most = next((count for count in range(MOST_WORKERS, 0, -1) if 2 * count * (count + 1) + 100 <= limit), 1)
    if workers > most:
        raise InputError(
            f"--workers: {workers:,} processes are more than the {most} that can have pipes to each other; this process may "
            f"open {limit:,} files (ulimit -n)"
        )


@contextmanager
def _without_main_import() -> Iterator[None]:
    """Keep multiprocessing from importing the user's script again in each worker, which does not need it; so a script that
    uses this package needs no ``if __name__ == "__main__"``."""
    main = sys.modules["__main__"].__dict__
    saved: dict[str, object] = {name: main[name] for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(saved)
