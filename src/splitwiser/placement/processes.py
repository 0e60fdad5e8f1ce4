"""Modes ``mp`` and ``mps``: workers in processes of their own that share one copy of the weights and one KV pool.

The parent loads the model, puts its weights into shared memory, makes the pool there and starts the workers; tensors are
never sent again. From then on it only feeds, collects and supervises.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path

import psutil
import torch
import torch.multiprocessing
from tqdm import tqdm
from transformers import PreTrainedModel

from splitwiser import constants
from splitwiser.engine.cuda_graphs import capture_graphs
from splitwiser.engine.engine import SplitEngine
from splitwiser.engine.messages import Failed, Message, Progress, Ready, Stop, Submit, WorkerSpec
from splitwiser.engine.policy import MostRoom
from splitwiser.engine.steps import ModelStepper, warm_up_prefill
from splitwiser.engine.worker import PARENT, build_worker, serve
from splitwiser.errors import InputError, RunError, WorkerLostError
from splitwiser.machine.process import environment, keep_freed_memory, shorten_socket_paths, uninterrupted
from splitwiser.machine.shared_memory import SharedMemory, SharedModule
from splitwiser.model.kernels.choose import load_kernels
from splitwiser.model.kernels.interface import LayerShape
from splitwiser.model.kv_pool import KVPool, block_nbytes
from splitwiser.model.loading import LoadedModel
from splitwiser.placement.board import Board
from splitwiser.placement.checks import refuse_mode_here
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.cores import Threads, plan_cores, plan_levels
from splitwiser.placement.mailbox import LOOK_S, Mailbox, MailPlacement, MailTransport, Pipe
from splitwiser.placement.mps_daemon import MpsDaemon
from splitwiser.placement.prepare import Started, load, make_pool, prepare, scheduling_of
from splitwiser.placement.shares import AutoLevel, Part
from splitwiser.request import Request

BEAT_S = 0.1  # how often a worker shows that it lives
MISSED_LOOKS = 4  # looks in a row without a beat after which a worker counts as lost
START_S = 300.0  # longest that workers may take to come up
STOP_S = 5.0  # longest that they may take to end by themselves

# forkserver: CUDA forbids a fork once it is initialised, and a fork after OpenMP has run hangs in the child, so a plain
# fork of the parent is out. spawn would import torch and transformers anew in every worker, seconds of both cores and
# their memory once more each. The fork server has imported them once and has used neither CUDA nor OpenMP: workers start in
# milliseconds and share those pages. Its price is a further process, which ends with the parent.
_context = torch.multiprocessing.get_context("forkserver")


def warm_up_start() -> None:
    """Start the fork server, so that its imports go on while the parent loads the model."""
    forkserver.set_forkserver_preload([__name__])
    shorten_socket_paths()
    # by its safe path it imports nothing from the current folder, where a file may have the name of a module
    # threads that a worker has on cores lent to it must not spin there once their owner wants them back
    with environment(OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false", PYTHONSAFEPATH="1"):
        forkserver.ensure_running()


@dataclass(frozen=True)
class _Setup:
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


def _work(setup: _Setup) -> None:
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
        _serve(setup, transport)
    except BaseException as error:
        line = f"{type(error).__name__}: {error}"
        transport.send(PARENT, Failed(name, line, traceback.format_exc()))
        sys.exit(1)


def _serve(setup: _Setup, transport: MailTransport) -> None:
    board = Board.over(setup.board.tensor)
    threading.Thread(target=_beat, args=(board, setup.index), name="heartbeat", daemon=True).start()
    config = setup.config
    if config.share == "fixed" and not config.lend:
        os.sched_setaffinity(0, plan_cores(setup.workers, setup.cores)[setup.index])  # this thread and those it makes
    part = _part(setup, board)
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
    pool.prefault(setup.own_blocks)
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


def _part(setup: _Setup, board: Board) -> Part:
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


def _beat(board: Board, index: int) -> None:
    while True:
        board.beat(index)
        time.sleep(BEAT_S)


class ProcessPlacement(MailPlacement):
    """Worker processes and the pipes to them; see :class:`splitwiser.engine.engine.Placement`."""

    def __init__(
        self, setups: Sequence[_Setup], parent_ends: dict[str, tuple[Pipe, Pipe]], daemon: MpsDaemon | None
    ) -> None:
        self._daemon = daemon
        self._outbox = {name: to for name, (to, _) in parent_ends.items()}
        self._board = Board.over(setups[0].board.tensor)
        self._beats = self._board.beats()
        self._missed = [0] * len(setups)
        self._next_look_s = 0.0
        self._ready: set[str] = set()
        self._shared = [*setups[0].module.memories, setups[0].pool]
        self.graphs = ""  # what the workers that decode say of their CUDA graphs
        blocks = {setup.spec.name: len(setup.own_blocks) for setup in setups if setup.spec.role != "prefill"}
        self._router = MostRoom(blocks, constants.BLOCK_TOKENS)
        with _main_left_alone():
            self._processes = [
                _context.Process(target=_work, args=(setup,), name=setup.spec.name, daemon=True) for setup in setups
            ]
            for process in self._processes:
                process.start()
        for setup in setups:  # the workers hold their ends now; a pipe closes only when nobody holds its other end
            for pipe in [*setup.inbox.values(), *setup.outbox.values()]:
                pipe.close()
        self._mailbox = Mailbox({name: come for name, (_, come) in parent_ends.items()}, on_closed=lambda _: None)
        super().__init__(self._mailbox)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by worker."""
        return {process.name: process.pid or 0 for process in self._processes}

    def wait_ready(self) -> None:
        """Return when every worker is up, and a client of the MPS daemon if there is one; shows a progress line on a
        terminal."""
        deadline = time.monotonic() + START_S
        waiting = {process.name for process in self._processes}
        with tqdm(total=len(waiting), desc="workers ready", unit="worker", disable=None, leave=False) as bar:
            while waiting:
                for message in self.poll(time.perf_counter_ns() + int(LOOK_S * 1e9)):
                    if isinstance(message, Ready):
                        self.graphs = message.graphs or self.graphs
                        waiting.discard(message.worker)
                        self._ready.add(message.worker)
                        bar.update(1)
                if time.monotonic() > deadline:
                    raise RunError(f"workers {', '.join(sorted(waiting))} were not ready after {START_S:.0f} s")
        if self._daemon:
            self._daemon.wait_for_clients(self.pids)

    def submit(self, request: Request) -> None:
        """Give the request to the decode worker that has the most room left."""
        try:
            self._outbox[self._router.choose(request)].send(Submit(request))
        except OSError:  # it has died; the next poll says so
            return

    @uninterrupted()
    def close(self) -> None:
        """Ask every worker to stop after its step, wait, and end by force those that do not."""
        for pipe in self._outbox.values():
            try:
                pipe.send(Stop())
            except OSError:
                continue
        self._join(STOP_S)
        for process in self._processes:
            process.terminate()
        self._join(1.0)
        for process in self._processes:
            process.kill()
        self._join(1.0)
        for pipe in self._outbox.values():
            pipe.close()
        for memory in self._shared:
            memory.forget_receivers()

    def _note(self, message: Message) -> None:
        if isinstance(message, Progress):
            for request_id, _ in message.finished:
                self._router.release(request_id)

    def _join(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def _find_lost(self) -> WorkerLostError | None:
        for process in self._processes:
            if process.exitcode is not None:
                self._mailbox.read_out(process.name, LOOK_S)
                how = _how_it_ended(process.exitcode)
                return WorkerLostError(f"worker {process.name} (process {process.pid}) {how}")
        if time.monotonic() < self._next_look_s:
            return None
        self._next_look_s = time.monotonic() + LOOK_S
        if self._daemon and (fault := self._daemon.find_fault()):
            return WorkerLostError(fault)
        beats = self._board.beats()
        for number, (now, before) in enumerate(zip(beats, self._beats, strict=True)):
            # counted in looks, not in time: where the whole machine stood still, so did the looks. And not before a worker
            # is ready: CUDA's start holds the interpreter's lock, seconds on end where several start at once
            silent = now == before and self._processes[number].name in self._ready
            self._missed[number] = self._missed[number] + 1 if silent else 0
        self._beats = beats
        for process, missed in zip(self._processes, self._missed, strict=True):
            if missed >= MISSED_LOOKS:
                state = _process_state(process.pid)
                return WorkerLostError(f"worker {process.name} (process {process.pid}, {state}) does not answer")
        return None


def _how_it_ended(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    return f"was killed by {signal.Signals(-exitcode).name}"


def _process_state(pid: int | None) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.Error:
        return "gone"


def start(config: EngineConfig, _: ExitStack) -> Started:
    """See :meth:`splitwiser.placement.start.ModeModule.start`."""
    refuse_mode_here(config.mode, config.device_name)
    return start_workers(config, config.device_name)


def start_workers(config: EngineConfig, device: str, daemon: MpsDaemon | None = None) -> Started:
    """Load the model onto ``device`` and start an engine over worker processes; every decode or mixed worker owns an equal
    part of the pool's blocks. With a ``daemon``, each is its client, with its share. Returns when all are ready."""
    warm_up_start()
    model = load(config, device)
    if model.device.type == "cuda" and config.share == "auto":
        raise InputError("share auto in mode mp divides a CPU's cores, and the device is a GPU; use mode green")
    prepared = prepare(model, config)
    layers, blocks = prepared.layers, prepared.blocks
    specs = config.specs
    owners = [number for number, spec in enumerate(specs) if spec.role != "prefill"]
    block_tokens = constants.BLOCK_TOKENS
    part = blocks // len(owners)
    if not part:
        raise InputError(
            f"kv_memory '{config.kv_memory}' holds {blocks} blocks, which is less than one for each decode worker"
        )
    module = SharedModule(model.module, model.device)
    pool_memory = SharedMemory(block_nbytes(layers, block_tokens, model.dtype) * blocks, model.device)
    board = SharedMemory(Board.nbytes(len(specs)), torch.device("cpu"))
    cores = tuple(sorted(os.sched_getaffinity(0)))
    thread_levels = plan_levels(specs, len(cores), config.share)
    Board.over(board.tensor).level = len(thread_levels) // 2
    inboxes, outboxes, parent_ends = _pipes([spec.name for spec in specs])
    setups = [
        _Setup(
            index=number,
            workers=specs,
            model=replace(model, module=None),  # type: ignore[arg-type]  # it travels as shared memory
            module=module,
            layers=layers,
            refused_kernels=prepared.refused_kernels,
            pool=pool_memory,
            blocks=blocks,
            own_blocks=range(owners.index(number) * part, (owners.index(number) + 1) * part)
            if number in owners
            else range(0),
            board=board,
            config=config,
            cores=cores,
            thread_levels=thread_levels,
            environment=daemon.worker_environment(spec, config) if daemon else {},
            inbox=inboxes[spec.name],
            outbox=outboxes[spec.name],
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
    return Started(
        model,
        SplitEngine(model, placement, part * block_tokens),
        pool,
        {**prepared.described, "decode_graphs": placement.graphs},
        [dict(zip([spec.name for spec in specs], threads, strict=True)) for threads in thread_levels]
        if model.device.type == "cpu"
        else [],
    )


def _pipes(
    names: Sequence[str],
) -> tuple[dict[str, dict[str, Pipe]], dict[str, dict[str, Pipe]], dict[str, tuple[Pipe, Pipe]]]:
    """A pipe for every ordered pair of processes: inboxes and outboxes of the workers by the other's name, and the
    parent's two ends (to, from) by worker."""
    inboxes: dict[str, dict[str, Pipe]] = {name: {} for name in names}
    outboxes: dict[str, dict[str, Pipe]] = {name: {} for name in names}
    parent_ends = {}
    for name in names:
        inboxes[name][PARENT], to_worker = _context.Pipe(duplex=False)
        from_worker, outboxes[name][PARENT] = _context.Pipe(duplex=False)
        parent_ends[name] = to_worker, from_worker
        for other in names:
            if other != name:
                inboxes[other][name], outboxes[name][other] = _context.Pipe(duplex=False)
    return inboxes, outboxes, parent_ends


@contextmanager
def _main_left_alone() -> Iterator[None]:
    """Keep multiprocessing from importing the user's script anew in each worker, which needs nothing of it; so a script
    that uses this package needs no ``if __name__ == "__main__"``."""
    main = sys.modules["__main__"].__dict__
    kept: dict[str, object] = {name: main[name] for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(kept)
