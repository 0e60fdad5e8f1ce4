"""Tests and measures everything that needs a GPU, in stages with time limits.

A machine with a GPU may be available only for minutes, without a network, and return few files. So stages are run by name,
in any selection and order; each has a limit in seconds; one that fails or is cut does not stop the next. After each stage,
and while a long one runs, all results so far are packed into ONE file, results.tar.gz, from which a later call continues:
it skips the stages that have passed, the finished runs of a comparison and the probes that have succeeded. A stage for which
something is not on the machine is skipped, and says what.
"""

import argparse
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import gpu_results
import yaml
from gpu_results import ARCHIVE, PROJECT, RECORD, read_json

from splitwiser.errors import InputError, SplitwiserError, unknown_name
from splitwiser.machine import cuda_probe
from splitwiser.machine.describe import git_commit
from splitwiser.placement.modes import MODES

SUMMARY, LEFT_OUT = "summary.txt", "left_out.txt"
# not in the archive: of no use there, or (checkpoints) regenerated from a seed
UNPACKED = {LEFT_OUT, "trace.json", "generations.csv", "models"}
ARCHIVE_BYTES = 16 << 20  # largest archive
PACK_S = 20.0  # seconds between two packings of a running stage
STOP_S = 8.0  # seconds of a stage's limit that it has after SIGINT to write its results
LINES, WIDTH = 100, 115  # of the summary: a reply of 12,000 characters holds it
MARK = "SPLITWISER_GPU_CHECK"  # environment variable that identifies the processes of a stage
PASSED, CUT, SKIPPED = "passed", "cut", "skipped"

SWEEPS = PROJECT / "configs" / "sweeps"
MODELS: dict[str, dict[str, Any]] = {  # model and requests by the part of a stage's name
    "125m": {"model": "opt-125m", "requests": 128, "prompt_tokens": "uniform:128:1024", "output_tokens": "128"},
    "1b": {"model": "llama-3.2-1b", "requests": 128, "prompt_tokens": "uniform:256:2048", "output_tokens": "128"},
    "7b": {"model": "llama2-7b-chat", "requests": 64, "prompt_tokens": "uniform:256:2048", "output_tokens": "128"},
}
ARRIVING = 2  # factor on the requests where they arrive over time, so that most of that time is under full load
LOADS = (60, 80)  # percent of what BASE answers when all requests arrive at once
QUICK: dict[str, Any] = {"model": "radiology-opt", "requests": 4, "prompt_tokens": "16", "output_tokens": "4"}


@dataclass(frozen=True)
class Check:
    """The context of the stages: the folder of their results, and whether their loads are tiny (``quick``)."""

    work: Path
    quick: bool = False

    def folder(self, stage: str) -> Path:
        """Return the folder of ``stage``; creates it if it does not exist."""
        folder = self.work / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def modes(self) -> list[str]:
        """The modes that work according to the doctor; all modes if it has not run."""
        found = read_json(self.work / "doctor" / "doctor.json").get("modes")
        return [mode["mode"] for mode in found if mode["works"]] if found else list(MODES)

    def finding(self, name: str) -> dict[str, Any]:
        """Return the doctor's finding ``name``; empty if it has not run."""
        found: list[dict[str, Any]] = read_json(self.work / "doctor" / "doctor.json").get("findings", [])
        return next((each for each in found if each["name"] == name), {})

    @property
    def has_gpu(self) -> bool:
        """Whether the doctor found a GPU to run on."""
        return "cuda" in str(self.finding("device").get("figures", {}).get("device"))


class SkippedError(Exception):
    """A stage cannot run, since what it needs is not on this machine."""


@dataclass(frozen=True)
class Stage:
    """Its limit in seconds, a description, and its commands; each command is generated after the previous one has ended."""

    limit_s: int
    about: str
    commands: Callable[[Check], Iterator[list[str]]]


def splitwiser(*arguments: str) -> list[str]:
    """Return a command of this project."""
    return [sys.executable, "-m", "splitwiser", *arguments]


def together(check: Check) -> list[str]:
    """Return the option that runs a comparison in one process, on a GPU: imports take longer than most runs."""
    return ["--one_process"] if check.has_gpu else []


def script(path: str, *arguments: str) -> list[str]:
    """Return the command of a script at ``path`` in the project."""
    return [sys.executable, "-u", str(PROJECT / path), *arguments]


# -- the stages


def probe(check: Check) -> Iterator[list[str]]:
    """Probe the features that the modes need."""
    yield script("scripts/gpu_probe.py", "--out", str(check.folder("probe") / "probe.csv"))


def doctor(check: Check) -> Iterator[list[str]]:
    """Find the modes that work."""
    path = check.folder("doctor") / "doctor.json"
    yield ["sh", "-c", 'exec "$@" >"$0"', str(path), *splitwiser("doctor", "--json")]


def needs_modes(check: Check) -> Iterator[list[str]]:
    """Run the doctor if it has not run yet."""
    if not (check.work / "doctor" / "doctor.json").exists():
        yield from doctor(check)


def tokens(stage: str, options: str, check: Check) -> Iterator[list[str]]:
    """Compare every mode's float32 tokens, of the requests that the ``options`` of a run name."""
    yield from needs_modes(check)
    modes = ["generate", *(mode for mode in ("mp", "green", "mps", "sequential") if mode in check.modes)]
    yield splitwiser(
        "compare", "--modes", ",".join([modes[0], modes[-1]] if check.quick else modes), "--dtype", "float32",
        *options.format(limit=2 if check.quick else 40).split(), "--repeats", "1",
        "--results", str(check.folder(stage)), *together(check),
    )  # fmt: skip


def tests(check: Check) -> Iterator[list[str]]:
    """Run the tests that need a GPU and start no processes, side by side: they mostly import and compile."""
    quick = [PROJECT / "tests" / "engine" / "test_prefill_graphs.py"]
    yield pytest_command(check.folder("tests") / "here.xml", "not slow and not alone", 6, quick if check.quick else [])


def process_tests(check: Check) -> Iterator[list[str]]:
    """Run the tests that start processes, few side by side, since each process imports everything anew; and those of the
    whole GPU's memory, alone."""
    quick = [PROJECT / "tests" / "placement" / "test_processes.py"] if check.quick else []
    for name, which, workers in (("processes", "slow and not alone", 3), ("alone", "alone", 0)):
        yield pytest_command(check.folder("tests-processes") / f"{name}.xml", which, workers, quick)


def pytest_command(report: Path, which: str, workers: int, files: Sequence[Path]) -> list[str]:
    """Return the command that runs, of the tests marked gpu, those ``which`` names, in ``files`` or wherever there are any,
    ``workers`` side by side."""
    return [
        sys.executable, "-u", "-m", "pytest", "-m", f"gpu and {which}", "-n", str(workers), "-vv", "--tb=short",
        "--timeout=150", "-p", "failures_at_once", "-p", "no:cacheprovider", f"--junitxml={report}",
        *map(str, files or gpu_test_files()),
    ]  # fmt: skip


def gpu_test_files() -> list[Path]:
    """Return the files that have tests of a GPU: to collect all others would take longer than most of these tests."""
    files = sorted((PROJECT / "tests").rglob("test_*.py"))
    return [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def compare(model: str, load: int | None, check: Check) -> Iterator[list[str]]:
    """Compare the variants that work here on one model, with all requests at once or arrivals at ``load`` percent of
    capacity. A sweep, since it can be resumed."""
    yield from needs_modes(check)
    requests: Mapping[str, Any] = QUICK if check.quick else MODELS[model]
    if load is None:
        yield sweep(check, f"compare-{model}", "gpu", requests)
        return
    requests = {**requests, "requests": requests["requests"] * ARRIVING}
    # without generate, which waits for a full batch and so does not suit arrivals over time
    yield sweep(check, f"compare-{model}-{load}", "gpu", requests, load=load / 100, without="generate")


def sweep(
    check: Check, stage: str, file: str, base: Mapping[str, Any], load: float | None = None, without: str = ""
) -> list[str]:
    """Return the command of this project's sweep ``file`` in the folder of ``stage``, with the options of ``base`` and only
    the points whose modes work here, except the mode ``without``."""
    modes = [mode for mode in check.modes if mode != without]
    content = yaml.safe_load((SWEEPS / f"{file}.yaml").read_text(encoding="utf-8"))
    # file options are relative to the project, so that runs are recognised in another checkout
    content |= {"name": stage, "load": load, "base": {**content["base"], "data": "models/data", **base}}
    content |= {"repeats": 1} if check.quick else {}
    if "variants" in content:
        content["variants"] = {name: own for name, own in content["variants"].items() if own["mode"] in modes}
    if "grid" in content:
        grids = [
            {**grid, "mode": [mode for mode in _listed(grid["mode"]) if mode in modes]} for grid in content["grid"]
        ]
        content["grid"] = [grid for grid in grids if grid["mode"]]
    path = check.folder(stage) / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return splitwiser("sweep", str(path), "--results", str(path.parent), *together(check))


def _listed(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def interference(check: Check) -> Iterator[list[str]]:
    """Measure how the prefill of a long prompt delays a request in decode."""
    yield from needs_modes(check)
    sizes = ["--model", "radiology-opt", "--long", "100", "--new_tokens", "20", "--after", "0.01"]
    if not check.quick:
        sizes = ["--model", "llama-3.2-1b", "--long", "16000", "--new_tokens", "2000", "--after", "1.0"]
    modes = [mode for mode in ("sequential", "green", "mps", "mp") if mode in check.modes]
    out = check.folder("interference") / "interference.csv"
    yield script("examples/long_prompt.py", "--modes", ",".join(modes), *sizes, "--repeats", "2", "--out", str(out))


def paper(check: Check) -> Iterator[list[str]]:
    """Run the paper's experiment with the modes that work here."""
    yield from needs_modes(check)
    yield sweep(check, "paper", "paper_processes_mps", {**QUICK, "dtype": "float32"} if check.quick else {})


def peers(check: Check) -> Iterator[list[str]]:
    """Compare with transformers' generate (a mode) and its continuous batching."""
    yield from needs_modes(check)
    modes = [mode for mode in ("sequential", "green", "generate") if mode in check.modes]
    for model, rounds in (("llama-3.2-1b", 2), ("opt-125m", 1)) if not check.quick else (("opt-125m", 1),):
        tiny = shlex.split("--requests 2 --prompt_tokens 20 --output_tokens 3 --max_batch 2 --kv_memory 64MiB")
        yield splitwiser(
            "compare", "--modes", ",".join(modes), "--peer", f"hf-continuous={sys.executable}", "--model", model,
            "--load_format", "dummy", "--dtype", "bfloat16", "--workload", "standard", "--repeats", str(rounds),
            "--results", str(check.folder("peers") / model), *(tiny if check.quick else []),
        )  # fmt: skip


# what is asked of the modes by the stages that compare tokens
TOKENS = {
    "tokens": ("", "--model radiology-opt --limit {limit}"),
    "tokens-t5": (
        ", of an encoder-decoder",
        "--model t5-small --load_format dummy --requests {limit} --prompt_tokens uniform:1:200 --output_tokens 8 "
        "--kv_memory 256MiB",
    ),
    "tokens-adapters": (
        ", with LoRA, prefix tuning and none in one step",
        "--model radiology-opt --adapter lora,prefix --workload examples/adapters.jsonl",
    ),
}
LONG_S = 230  # under four minutes, so that two such stages fit into a command of at most ten


def needs_vllm(check: Check) -> Iterator[list[str]]:
    """Run the doctor if it has not run yet. Raises :class:`SkippedError`, in the doctor's words, without vLLM."""
    yield from needs_modes(check)
    found = check.finding("vllm")
    if not found.get("ok"):
        raise SkippedError(found.get("text", "the doctor does not know whether vLLM is there"))


def vllm_tokens(check: Check) -> Iterator[list[str]]:
    """Compare the float32 tokens of one engine of vLLM, of two over one copy of the weights, and of a prefill and a decode
    engine, with those of generate. Their models are not compiled, which would take minutes."""
    yield from needs_vllm(check)
    mode = "mps" if "mps" in check.modes else "mp"
    engines = {
        "one": "",
        "two": f" --mode {mode} --workers '[{{role: mixed, count: 2}}]'",
        "split": f" --mode {mode}",
    }
    variants = (f"vllm-{name}: --backend vllm --kernels plain{options}" for name, options in engines.items())
    yield splitwiser(
        "compare", "--modes", "generate", *(part for each in variants for part in ("--variant", each)),
        "--model", "radiology-opt", "--limit", "2" if check.quick else "40", "--dtype", "float32", "--kv_memory", "1GiB",
        "--repeats", "1", "--results", str(check.folder("vllm-tokens")), *together(check),
    )  # fmt: skip


def vllm(check: Check) -> Iterator[list[str]]:
    """Compare vLLM's engines, in the environment of their default place, with this project's own."""
    yield from needs_vllm(check)
    yield sweep(check, "vllm", "vllm", {**QUICK, "kernels": "plain"} if check.quick else MODELS["125m"])


STAGES = {
    "probe": Stage(
        52, "features that the modes need: CUDA's start, shared memory, green contexts, priorities, MPS, graphs", probe
    ),
    "doctor": Stage(42, "which modes work here", doctor),
    **{
        stage: Stage(
            80, f"every working mode's float32 tokens against those of generate{of}", partial(tokens, stage, options)
        )
        for stage, (of, options) in TOKENS.items()
    },
    "tests": Stage(LONG_S, "the tests marked gpu that start no processes", tests),
    "tests-processes": Stage(LONG_S, "the other tests marked gpu", process_tests),
    **{
        f"compare-{model}{'' if load is None else f'-{load}'}": Stage(
            LONG_S,
            f"the modes on {MODELS[model]['model']}, "
            + ("all requests at once" if load is None else f"arrivals at {load}% of what {gpu_results.BASE} answers"),
            partial(compare, model, load),
        )
        for load in (None, *LOADS)
        for model in MODELS
    },
    "interference": Stage(150, "how a long prompt's prefill delays a request in decode", interference),
    "paper": Stage(LONG_S, "the paper's experiment (configs/sweeps/paper_processes_mps.yaml)", paper),
    "peers": Stage(LONG_S, "transformers' generate and continuous batching against this engine", peers),
    "vllm-tokens": Stage(
        LONG_S, "float32 tokens of vLLM's engines (scripts/install_backend.sh vllm) against generate's", vllm_tokens
    ),
    "vllm": Stage(LONG_S, "one engine of vLLM, two, and prefill and decode engines, against this project's own", vllm),
}


# -- running them


def run_stage(stage: Stage, check: Check, log: Path, seconds: float, tick: Callable[[], None]) -> str:
    """Run the stage's commands, one after another, for at most ``seconds``; their output goes to ``log``. Calls ``tick``
    regularly. Returns how the stage ended; raises only when this process is interrupted."""
    deadline = time.monotonic() + seconds
    failed: list[str] = []
    try:
        for command in stage.commands(check):
            ended = run_command(command, log, deadline, tick)
            if ended == CUT:
                return CUT
            failed += [] if ended == PASSED else [ended]
    except SkippedError as error:
        return f"{SKIPPED}: {error}"
    except Exception as error:
        with log.open("a", encoding="utf-8") as output:
            output.write(f"{type(error).__name__}: {error}\n")
        failed.append(f"{type(error).__name__}: {error}")
    return f"failed: {'; '.join(failed)}" if failed else PASSED


def run_command(command: Sequence[str], log: Path, deadline: float, tick: Callable[[], None]) -> str:
    """Run ``command`` until ``deadline`` (of time.monotonic) at the latest: it gets SIGINT :data:`STOP_S` earlier, so that
    pytest and sweeps write their results, and SIGKILL for all its remaining processes in the end. Returns how it ended."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=PROJECT,
            env=os.environ | {MARK: mark}, start_new_session=True,
        )  # fmt: skip
    stopped = False
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                break
            if time.monotonic() > deadline - STOP_S and not stopped:
                os.killpg(process.pid, signal.SIGINT)
                stopped = True
            try:
                process.wait(min(PACK_S, max(0.05, deadline - time.monotonic() - (0 if stopped else STOP_S))))
            except subprocess.TimeoutExpired:
                with suppress(OSError):  # a folder that was just moved is packed next time
                    tick()
    finally:
        kill_marked(mark)
        with suppress(subprocess.TimeoutExpired):  # a process that hangs inside the driver cannot be killed
            process.wait(STOP_S)
    if stopped:
        return CUT
    return PASSED if process.returncode == 0 else f"exit code {process.returncode}"


def kill_marked(mark: str) -> None:
    """Kill all processes of a stage, in whatever session they are, so that none survives into the next stage."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(2):  # a process may have started another meanwhile
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except OSError:  # it has ended, or belongs to another user
                continue


class Record:
    """``check.json``: the GPU, and each stage that was run: its outcome, start, commit and seconds."""

    def __init__(self, work: Path) -> None:
        self._path = work / RECORD
        content = read_json(self._path)
        self.gpu: str | None = content.get("gpu")
        self.stages: dict[str, dict[str, Any]] = content.get("stages", {})

    def set_gpu(self, name: str) -> None:
        """Set the name of the GPU. Raises :class:`InputError` if earlier stages were measured on another one."""
        if self.gpu not in (None, name):
            raise InputError(f"earlier stages were measured on {self.gpu}, and this is {name}; start over without them")
        self.gpu = name

    def passed(self, name: str) -> bool:
        """Return whether stage ``name`` has passed."""
        return self.stages.get(name, {}).get("ended") == PASSED

    def commits(self, name: str) -> list[str]:
        """Return the commits of stage ``name`` so far: a later call keeps the results of earlier ones."""
        return gpu_results.commits_of(self.stages[name]) if name in self.stages else []

    def add(self, name: str, **what: object) -> None:
        """Record a stage that has ended or is running."""
        self.stages[name] = what
        content = {"gpu": self.gpu, "stages": self.stages}
        self._path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def find_gpu() -> str:
    """Return the name of the first GPU, or cpu if there is none. CUDA starts in a separate process."""
    command = [sys.executable, cuda_probe.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    gpus = json.loads(done.stdout).get("gpus")
    return str(gpus[0]["name"]) if gpus else "cpu"


def run_stages(
    stages: Mapping[str, Stage], check: Check, results: Path, *, seconds: float | None = None, again: bool = False
) -> list[str]:
    """Run the ``stages`` that have not passed yet (with ``again``, all from the start), pack after each, and return the
    names of those that neither passed nor were skipped."""
    record = Record(check.work)
    record.set_gpu(find_gpu())
    pack_here = partial(pack, check.work, results)
    for name, stage in stages.items():
        if again:
            shutil.rmtree(check.work / name, ignore_errors=True)
        elif record.passed(name):
            print(f"{name}: passed in an earlier call", flush=True)
            continue
        limit = seconds or stage.limit_s
        print(f"{name}: at most {limit:.0f} s", flush=True)
        began = time.monotonic()
        commits = dict.fromkeys([*(() if again else record.commits(name)), str(git_commit())])
        what = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"), "commit": ", ".join(commits),
            "command": f"scripts/gpu_check.sh {name}{' --quick' if check.quick else ''}",
        }  # fmt: skip
        record.add(name, ended="interrupted", seconds=0, **what)
        ended = run_stage(stage, check, check.folder(name) / "log.txt", limit, pack_here)
        took = time.monotonic() - began
        record.add(name, ended=ended, seconds=round(took, 1), **what)
        print(f"{name}: {ended} ({took:.0f} s)", flush=True)
        pack_here()
    return [name for name in stages if not str(record.stages[name]["ended"]).startswith((PASSED, SKIPPED))]


def size(path: Path) -> int:
    """Return a file's size in bytes; 0 if it was just removed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read(path: Path) -> bytes:
    """Return a file's content; empty if it was just removed."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def pack(work: Path, results: Path) -> None:
    """Put all files of ``work`` into the archive in ``results``, which is replaced atomically. The smallest come first, so
    that only the few largest may have no room; :data:`LEFT_OUT` lists these."""
    left_out = []
    buffer = io.BytesIO()
    with tarfile.open(mode="w:gz", fileobj=buffer, compresslevel=6) as archive:

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), int(time.time())
            archive.addfile(entry, io.BytesIO(content))

        for path in sorted(work.rglob("*"), key=size):
            name = str(path.relative_to(work))
            if not path.is_file() or UNPACKED.intersection(path.relative_to(work).parts):
                continue
            if buffer.tell() + size(path) > ARCHIVE_BYTES - (
                1 << 18
            ):  # the difference is for data that is not written yet
                left_out.append(name)
            else:
                add(name, read(path))
        if left_out:
            add(LEFT_OUT, "\n".join([*left_out, ""]).encode())
    results.mkdir(parents=True, exist_ok=True)
    partial_path = results / f".{ARCHIVE}.partial"
    partial_path.write_bytes(buffer.getvalue())
    partial_path.replace(results / ARCHIVE)


# -- the summary


def summarise(check: Check, names: Sequence[str]) -> list[str]:
    """Return at most :data:`LINES` lines: the outcomes of all stages, the results of ``names``, and causes of failures."""
    record = Record(check.work)
    lines = [f"machine: {gpu_results.machine_line(check.work)}"]
    lines += [
        f"  {name}: {what['ended']} ({what['seconds']:.0f} s, {what['started']}, commit {gpu_results.short_commits([what])})"
        for name, what in record.stages.items()
    ]
    for name in names:
        found = found_lines(check.work / name)
        lines += ["", f"{name}:", *found] if found else []
    failures = [line for name in names for line in failure_lines(check.work / name, record.stages.get(name, {}))]
    room = LINES - min(len(failures), LINES // 3)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... ({len(lines) - room + 1} more lines are in the archive's tables)"]
    lines += failures[: LINES - len(lines)]
    return [line[:WIDTH] for line in lines]


def found_lines(folder: Path) -> list[str]:
    """Return the results of a stage as lines."""
    table = gpu_results.table_of(folder)
    return gpu_results.text_table(table) if len(table) else []


def failure_lines(folder: Path, what: Mapping[str, Any]) -> list[str]:
    """Return why a stage did not pass: the ends of its log, unless it was cut, and of the logs of its failed runs."""
    ended = what.get("ended", PASSED)
    if ended == PASSED or ended.startswith(SKIPPED):
        return []
    lines = []
    for log in [*([folder / "log.txt"] if ended != CUT else []), *gpu_results.failed_logs(folder)][:6]:
        lines += ["", f"end of {folder.name}/{log.name}:", *(f"  {line}" for line in tail(log, 10))]
    return lines


def tail(path: Path, count: int) -> list[str]:
    """Return the last non-empty lines of a file; of a progress bar, its last state."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [line for line in text.splitlines() if line.strip() and "%|" not in line][-count:]


# -- the command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the options. Raises :class:`InputError`."""
    width = max(map(len, STAGES))
    table = "\n".join(f"  {name:{width}}  {stage.limit_s:3} s  {stage.about}" for name, stage in STAGES.items())
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"stages and their limits:\n{table}",
    )  # fmt: skip
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="stages to run, in this order")
    parser.add_argument("--seconds", type=float, help="limit of each stage, instead of its own")
    parser.add_argument(
        "--again", action="store_true", help="run stages from the start, even if they have passed or begun"
    )
    parser.add_argument("--quick", action="store_true", help="tiny loads that a CPU can run too, to try out the check")
    parser.add_argument(
        "--results", type=Path, default=Path(os.environ.get("OUT") or PROJECT / "results" / "gpu_check"),
        help=f"folder that gets {ARCHIVE} and {SUMMARY} (default: $OUT, or results/gpu_check)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help=f"continue from this {ARCHIVE} (default: from one in --results)"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for the working files, which is kept (default: a temporary one)"
    )
    parser.add_argument(
        "--import", dest="imported", type=Path, metavar="FILE",
        help=f"copy what README and docs need from this {ARCHIVE} into results/reference, and write their tables",
    )  # fmt: skip
    parser.add_argument("--as", dest="name", help="name of that folder (default: gpu-<card>-<date>)")
    parser.add_argument(
        "--tables", action="store_true", help="write the tables of README and docs from the newest such folder"
    )
    options = parser.parse_args(arguments)
    for name in options.stages:
        if name not in STAGES:
            raise unknown_name("stage", name, STAGES)
    if not options.stages and not options.imported and not options.tables:
        raise InputError("name the stages to run; --help lists them")
    if options.seconds is not None and not options.seconds > 0:
        raise InputError(f"--seconds must be more than 0, not {options.seconds:g}")
    return options


def write_tables() -> None:
    """Write the tables of README and docs from the newest reference check."""
    abouts = {name: stage.about for name, stage in STAGES.items()}
    parts = gpu_results.sections(gpu_results.newest_reference(), abouts)
    gpu_results.write_sections(PROJECT, parts)


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Yield the folder of the working files, with the results of an earlier call."""
    with tempfile.TemporaryDirectory(prefix="splitwiser-check-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        archive = options.resume or options.results / ARCHIVE
        if not (work / RECORD).exists() and (options.resume or archive.exists()):
            gpu_results.unpack(archive, work)
        yield work


def check(options: argparse.Namespace) -> int:
    """Run the given stages; returns 1 if one did not pass."""
    with work_folder(options) as work:
        context = Check(work, options.quick)
        stages = {name: STAGES[name] for name in options.stages}
        try:
            failed = run_stages(stages, context, options.results, seconds=options.seconds, again=options.again)
        finally:
            pack(work, options.results)
            text = "\n".join(summarise(context, options.stages))
            (options.results / SUMMARY).write_text(text + "\n", encoding="utf-8")
            print(text, flush=True)
    return int(bool(failed))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a stage did not pass, 2 for a wrong input, 130 after Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the results are then packed, as after Ctrl-C
    try:
        options = parse(arguments)
        if options.imported:
            print(gpu_results.import_archive(options.imported, options.name))
        if options.imported or options.tables:
            write_tables()
        return check(options) if options.stages else 0
    except SplitwiserError as error:
        print(f"gpu_check: {error.cli_message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("gpu_check: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
