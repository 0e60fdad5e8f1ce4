"""Probes the GPU features that the modes need: CUDA's start, memory of other processes, green contexts, stream priorities,
MPS and CUDA graphs of prefill steps.

    PYTHONPATH=src python scripts/gpu_probe.py [NAME...] [--out probe.csv]

Each probe runs in its own process with a deadline, so that one that hangs or crashes does not affect the others; the most
informative come first. Each finding is printed at once and appended to --out as a row: probe, name, value, unit. Probes
that have succeeded according to that file are not run again.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from splitwiser.machine.shared_memory import SharedMemory

DEADLINE_S = 40.0  # for a probe, and for a process that it waits for
COLUMNS = ("probe", "name", "value", "unit")
ENDED = "ended"  # the name of a probe's last row; its value is OK or what went wrong
OK = "ok"
GIB = 1 << 30
PACKAGES = ("torch", "triton", "transformers", "cuda-bindings", "numpy", "pandas", "nvidia-cudnn-cu13", "nvidia-ml-py")
TOOLS = ("nvidia-smi", "nvidia-cuda-mps-control", "nvidia-cuda-mps-server", "g++", "nvcc", "git")
SMI = "name,driver_version,compute_mode,mig.mode.current,clocks.max.sm,clocks.max.mem,power.limit,memory.total"

PREFILL_MODEL = "llama-3.2-1b"
PREFILL_LENGTHS = ((16,), (250,), (1000, 1000), (2040,))  # of the prompts of each timed step

Found = float | int | str | bool
Say = Callable[..., None]  # name, value and, of a number, its unit
PROBES: dict[str, Callable[[Say], None]] = {}


def probe(function: Callable[[Say], None]) -> Callable[[Say], None]:
    """Register ``function`` in :data:`PROBES` under its name."""
    PROBES[function.__name__] = function
    return function


# -- what probes share


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that ``run`` takes, and the longest time within it during which no other thread of this process
    could run: a library call that holds the interpreter lock stops the heartbeats of a worker."""
    gaps, ended = [0.0], threading.Event()

    def beat() -> None:
        last = time.perf_counter()
        while not ended.wait(0.005):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    time.sleep(0.02)  # one more beat, to detect a gap at the end
    ended.set()
    thread.join()
    return seconds, max(gaps)


def say_timed(say: Say, name: str, took: tuple[float, float]) -> None:
    """Report both values of :func:`timed`."""
    say(name, took[0], "s")
    say(f"{name}, lock held", took[1], "s")


def start_context() -> None:
    """Start CUDA and create this process's context."""
    import torch

    torch.cuda.init()
    torch.cuda.set_device(0)
    torch.empty(1, device="cuda")


def captured(run: Callable[[], object], stream: "torch.cuda.Stream") -> "torch.cuda.CUDAGraph":
    """Return a CUDA graph of ``run``, captured on ``stream``."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph


def answer(receive: Connection) -> Any:  # noqa: ANN401  # whatever the other process sends
    """Return what another process sends. Raises TimeoutError."""
    if not receive.poll(DEADLINE_S / 2):
        raise TimeoutError("another process did not answer in time")
    return receive.recv()


# -- the probes, the most telling first


@probe
def machine(say: Say) -> None:
    """Report versions, tools and limits."""
    for name in PACKAGES:
        try:
            say(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            say(name, "not installed")
    for tool in TOOLS:
        say(tool, shutil.which(tool) or "not on PATH")
    say("python", sys.version.split()[0])
    say("cores", len(os.sched_getaffinity(0)), "")
    say("shared memory (/dev/shm)", shutil.disk_usage("/dev/shm").total >> 20, "MiB")
    say("home is writable", os.access(Path.home(), os.W_OK))
    for name in sorted(os.environ):
        if name.startswith(("CUDA_", "PYTORCH_")):
            say(name, os.environ[name])
    if shutil.which("nvidia-smi"):
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        lines = (done.stdout or done.stderr).splitlines() or ["nothing"]
        for name, value in zip(SMI.split(","), lines[0].split(", "), strict=False):
            say(f"GPU {name}", value)


@probe
def start(say: Say) -> None:
    """Time CUDA's start, alone and in four processes at once: the time limit of a worker's heartbeats must allow for it."""
    began = time.perf_counter()
    import torch

    say("import torch", time.perf_counter() - began, "s")
    say_timed(say, "cuInit", timed(torch.cuda.init))
    say_timed(say, "context", timed(start_context))
    ones = torch.ones(64, 64, device="cuda")
    say_timed(say, "first product", timed(lambda: (ones @ ones).sum().item()))
    command = [sys.executable, __file__, "--start"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    took = [json.loads(child.communicate(timeout=DEADLINE_S)[0]) for child in children]
    say_timed(say, "context, worst of four at once", (max(each[0] for each in took), max(each[1] for each in took)))


@probe
def green(say: Say) -> None:
    """Check at several splits that green contexts confine plain and captured kernels to their own multiprocessors."""
    import torch

    from splitwiser.model.kernels.multiprocessors import note_multiprocessor
    from splitwiser.placement.green_contexts import count_multiprocessors, cut_device

    start_context()
    device = torch.device("cuda", 0)
    began = time.perf_counter()
    splits = [cut_device(device, round(count_multiprocessors(device) * percent / 100)) for percent in (88, 50, 12)]
    say("all splits made", time.perf_counter() - began, "s")
    numbers = torch.zeros(4096, dtype=torch.int32, device=device)

    def kernel() -> None:
        note_multiprocessor[(len(numbers),)](numbers)

    def used(run: Callable[[], object]) -> set[int]:
        numbers.fill_(-1)
        torch.cuda.synchronize()
        run()
        torch.cuda.synchronize()
        return {int(number) for number in numbers.tolist()}

    say("multiprocessors without a green context", len(used(kernel)), "")
    for contexts in splits:
        plain, graphs, elsewhere = [], [], []
        for context in contexts:
            stream = context.stream(device, priority=0)
            with torch.cuda.stream(stream):
                plain.append(used(kernel))
                graph = captured(kernel, stream)
                graphs.append(used(graph.replay))
            elsewhere.append(used(graph.replay))
        name = f"split {'/'.join(str(context.sms) for context in contexts)}"
        for phase, ran, ran_graph, replayed in zip(("prefill", "decode"), plain, graphs, elsewhere, strict=True):
            say(f"{name}: {phase}", len(ran), "multiprocessors")
            say(f"{name}: {phase}, graph", len(ran_graph), "multiprocessors")
            say(f"{name}: {phase}, graph replayed on another stream", len(replayed), "multiprocessors")
        say(f"{name}: used by both", len(plain[0] & plain[1]), "multiprocessors")
        say(f"{name}: used by both, graphs", len(graphs[0] & graphs[1]), "multiprocessors")


@probe
def beside(say: Say) -> None:
    """Time a graph of small products (decode) beside large ones (prefill): undivided, decode first, in green contexts; each
    with 8 and with 32 hardware queues."""
    for queues in (8, 32):
        environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": str(queues)}
        command = [sys.executable, __file__, "--beside"]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=DEADLINE_S / 2, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{queues} queues: {done.stderr.strip().splitlines()[-1]}")
        for name, value, unit in json.loads(done.stdout):
            say(f"{queues} queues, {name}", value, unit)


def measure_beside() -> list[tuple[str, float, str]]:
    """Return name, value and unit of each finding of :func:`beside` with the hardware queues of this process."""
    import torch

    from splitwiser.placement.green_contexts import count_multiprocessors, cut_device

    start_context()
    device = torch.device("cuda", 0)
    prefill, decode_part = cut_device(device, round(count_multiprocessors(device) * 0.4))
    random = partial(torch.randn, device=device, dtype=torch.bfloat16)
    left, right, rows, weight = random(2048, 4096), random(4096, 4096), random(64, 2048), random(2048, 2048)

    def decode() -> None:
        made = rows
        for _ in range(100):
            made = torch.relu(made @ weight)

    def products(count: int) -> None:
        for _ in range(count):
            left @ right

    found = []
    pairs = {
        "undivided": (torch.cuda.Stream(device), torch.cuda.Stream(device)),
        "decode first": (torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-5)),
        "green 40/60": (prefill.stream(device, priority=0), decode_part.stream(device, priority=0)),
    }
    for name, (prefill_stream, decode_stream) in pairs.items():
        with torch.cuda.stream(decode_stream):
            decode()
            decode_stream.synchronize()
        graph = captured(decode, decode_stream)

        def replay(graph: torch.cuda.CUDAGraph = graph, stream: torch.cuda.Stream = decode_stream) -> float:
            with torch.cuda.stream(stream):
                began = time.perf_counter()
                graph.replay()
                stream.synchronize()
                return (time.perf_counter() - began) * 1e3

        alone = [replay() for _ in range(35)][5:]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(prefill_stream):
            products(3)
            start.record()
            products(1000)
            end.record()
        end.synchronize()
        products_alone = start.elapsed_time(end)
        with torch.cuda.stream(prefill_stream):
            start.record()
            products(1000)
            end.record()
        together: list[float] = []
        while not end.query() and len(together) < 10_000:
            together.append(replay())
        end.synchronize()
        found += [
            (f"{name}: decode alone", statistics.median(alone), "ms"),
            (f"{name}: decode beside prefill", statistics.median(together) if together else float("nan"), "ms"),
            (f"{name}: decode beside prefill, worst", max(together, default=float("nan")), "ms"),
            (f"{name}: prefill alone", products_alone, "ms"),
            (f"{name}: prefill beside decode", start.elapsed_time(end), "ms"),
        ]
    return found


@probe
def mps(say: Say) -> None:
    """Test a private MPS daemon: its start, clients with all and with 40% of the GPU, and memory shared from outside."""
    import torch
    import torch.multiprocessing

    from splitwiser.machine.shared_memory import SharedMemory
    from splitwiser.placement import mps_daemon, mps_gpu

    if problem := mps_gpu.find_problem("cuda:0"):
        say("not here", problem)
        return
    began = time.perf_counter()
    with mps_daemon.mps_daemon(False, False, 0) as daemon:
        say("daemon answers", time.perf_counter() - began, "s")
        memory = SharedMemory(1 << 20, torch.device("cuda", 0))
        memory.tensor.fill_(7)
        torch.cuda.synchronize()
        context = torch.multiprocessing.get_context("spawn")
        receivers, children = {}, []
        for percent in (100, 40):
            receivers[percent], send = context.Pipe(duplex=False)
            environment = {**daemon.environment, mps_daemon.PERCENTAGE: str(percent)}
            children.append(context.Process(target=_as_mps_client, args=(memory, environment, send)))
            children[-1].start()
        for percent, receive in receivers.items():
            took, multiprocessors, right = answer(receive)
            say_timed(say, f"client at {percent}%: context", took)
            say(f"client at {percent}%", multiprocessors, "multiprocessors")
            say(f"client at {percent}%: memory from outside is right", right)
        say("clients", len(daemon.clients()), "")
        for child in children:
            child.terminate()
        for child in children:
            child.join()


def _as_mps_client(memory: "SharedMemory", environment: dict[str, str], send: Connection) -> None:
    os.environ.update(environment)
    import torch

    took = timed(start_context)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    send.send((took, multiprocessors, bool((memory.tensor == 7).all())))
    time.sleep(DEADLINE_S)  # stays a client until it is killed


@probe
def shared_memory(say: Say) -> None:
    """Open device memory of another process (CUDA IPC): small, 1 GiB, and as large as a KV pool."""
    import torch
    import torch.multiprocessing

    from splitwiser.machine.shared_memory import SharedMemory

    start_context()
    device = torch.device("cuda", 0)
    largest = min(32 * GIB, torch.cuda.mem_get_info(device)[0] // (2 * GIB) * GIB)
    memories = [SharedMemory(size, device) for size in sorted({1 << 20, min(GIB, largest), largest})]
    for memory in memories:
        memory.tensor[-64:] = 7
    torch.cuda.synchronize()
    context = torch.multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_open_memories, args=(memories, send))
    child.start()
    for memory, (took, right) in zip(memories, answer(receive), strict=True):
        name = f"{memory.tensor.nbytes >> 20} MiB"
        say_timed(say, f"{name}: opened", took)
        say(f"{name}: reads and writes are right", right and bool((memory.tensor[-64:] == 9).all()))
    child.join()


def _open_memories(memories: "Sequence[SharedMemory]", send: Connection) -> None:
    import torch

    start_context()
    found = []
    for memory in memories:
        took = timed(partial(getattr, memory, "tensor"))
        right = bool((memory.tensor[-64:] == 7).all())
        memory.tensor[-64:] = 9
        found.append((took, right))
    torch.cuda.synchronize()
    send.send(found)


@probe
def prefill_graphs(say: Say) -> None:
    """Time prefill steps, launched layer by layer and replayed as CUDA graphs, in turn."""
    from splitwiser.engine.steps import Chunk, SequenceState, make_stepper, prefill_step
    from splitwiser.placement.config import EngineConfig
    from splitwiser.placement.prepare import load, make_pool, prepare
    from splitwiser.request import Request, SamplingParams

    config = EngineConfig(model=PREFILL_MODEL, load_format="dummy", dtype="bfloat16", device="cuda", kv_memory="1GiB")
    model = load(config)
    pool = make_pool(model, prepare(model, config))
    stepper, described = make_stepper(model, pool, 1, config.step_tokens, {"prefill": ()})
    say("graphs", described["prefill_graphs"])
    for lengths in PREFILL_LENGTHS:
        chunks, first = [], 0
        for length in lengths:
            blocks = range(first, first + pool.blocks_for(length + 1))
            request = Request(0, (5,) * length, SamplingParams(max_tokens=2), seed=0)
            chunks.append(Chunk(SequenceState(request, blocks), 0, length))
            first = blocks.stop
        took: dict[str, list[float]] = {"launched": [], "replayed": []}
        for _ in range(10):
            for times, graphs in zip(took.values(), (None, stepper.prefill_graphs), strict=True):
                began = time.perf_counter()
                prefill_step(model, pool, chunks, graphs)  # returns once the device has finished
                times.append(time.perf_counter() - began)
        for name, times in took.items():
            say(f"{' + '.join(map(str, lengths))} tokens, {name}", 1e3 * statistics.median(times[2:]), "ms")


# -- running them


def run_probe(name: str, out: Path | None) -> None:
    """Run a probe in this process; its last row says how it ended. Exits with 1 if it failed."""

    def say(finding: str, value: Found, unit: str = "") -> None:
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"  {finding}: {shown} {unit}".rstrip(), flush=True)
        append(out, (name, finding, shown, unit))

    try:
        PROBES[name](say)
    except Exception as error:
        traceback.print_exc()
        append(out, (name, ENDED, f"failed: {type(error).__name__}: {' '.join(str(error).split())}"[:300], ""))
        sys.exit(1)
    append(out, (name, ENDED, OK, ""))


def append(out: Path | None, row: Sequence[str]) -> None:
    """Append a row to ``out``, if given."""
    if out is not None:
        with out.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(row)


def keep_finished(out: Path | None) -> set[str]:
    """Return the probes that succeeded according to ``out``, and remove the rows of all others from it."""
    if out is None:
        return set()
    rows: list[list[str]] = []
    if out.exists():
        with out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
    finished = {row[0] for row in rows if row[1:3] == [ENDED, OK]}
    with out.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *(row for row in rows if row[0] in finished)])
    return finished


def run_apart(name: str, out: Path | None) -> str:
    """Run a probe in its own process; returns how it ended."""
    command = [sys.executable, __file__, "--one", name, *(["--out", str(out)] if out else [])]
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        fault = f"failed: no end within {DEADLINE_S:.0f} s"
    else:
        if code >= 0:
            return OK if code == 0 else "failed"  # the probe has reported why
        fault = f"failed: killed by {signal.Signals(-code).name}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    append(out, (name, ENDED, fault, ""))
    return fault


def main() -> int:
    """Run the given probes; returns the exit code: 1 if one failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"probes to run, of {', '.join(PROBES)} (default: all)"
    )
    parser.add_argument("--out", type=Path, help="CSV file for the findings, one row each")
    for option in ("--one", "--start", "--beside"):  # used by this program to start itself
        parser.add_argument(option, nargs="?", const=True, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_probe(options.one, options.out)
    elif options.start:
        import torch  # noqa: F401  # not part of the measured time

        print(json.dumps(timed(start_context)))
    elif options.beside:
        print(json.dumps(measure_beside()))
    else:
        return run_all(parser, options.names, options.out)
    return 0


def run_all(parser: argparse.ArgumentParser, names: Sequence[str], out: Path | None) -> int:
    """Run the probes ``names`` (default: all) that have not succeeded before, each in its own process."""
    for name in names:
        if name not in PROBES:
            parser.error(f"unknown probe '{name}'; known: {', '.join(PROBES)}")
    finished = keep_finished(out)
    failed = 0
    for name in names or PROBES:
        if name in finished:
            continue
        print(f"{name}: {(PROBES[name].__doc__ or '').splitlines()[0]}", flush=True)
        began = time.monotonic()
        try:
            ended = run_apart(name, out)
        except KeyboardInterrupt:
            append(out, (name, ENDED, "failed: interrupted", ""))
            return 130
        failed += ended != OK
        print(f"  -> {ended}, {time.monotonic() - began:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
