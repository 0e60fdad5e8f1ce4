"""Mode ``mps``: the NVIDIA MPS daemon whose clients the workers are.

What this rests on, from NVIDIA's MPS documentation (docs.nvidia.com/deploy/mps) and the manual page
nvidia-cuda-mps-control(1):

* A process looks for its daemon, in ``CUDA_MPS_PIPE_DIRECTORY``, when it initialises CUDA, and runs without MPS if it finds
  none; so whether it is a client must be asked of the daemon. Its ``CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`` is read then, too.
* CUDA IPC works between clients and processes that are none. So the parent, which allocates weights and KV pool and
  launches nothing after that, stays outside: a client lasts as long as its process, and the daemon could not quit in peace
  before the parent's end. Only a GPU in compute mode EXCLUSIVE_PROCESS, which admits one process, the MPS server, makes
  the parent a client.
* A daemon that has ``CUDA_VISIBLE_DEVICES`` counts those devices anew for its clients. UUIDs mean the same to both.
* ``quit -t SECONDS`` lets clients finish, then ends the servers, and returns when the daemon has ended. A client that ends
  with work under way can hang the server, so the workers are stopped first.
"""

import json
import os
import platform
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from splitwiser.engine.messages import WorkerSpec
from splitwiser.errors import InputError, RunError, first_line
from splitwiser.machine.process import environment, find_children_problem, start_ticks, uninterrupted
from splitwiser.placement.config import EngineConfig

CONTROL = "nvidia-cuda-mps-control"
PIPES = "CUDA_MPS_PIPE_DIRECTORY"
LOGS = "CUDA_MPS_LOG_DIRECTORY"
PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PRIORITY, NORMAL, BELOW_NORMAL = "CUDA_MPS_CLIENT_PRIORITY", 0, 1
DEFAULT_PIPES, DEFAULT_LOGS = "/tmp/nvidia-mps", "/var/log/nvidia-mps"

COMMAND_S = 5.0  # longest that a command to the daemon may take
START_S = 10.0  # longest that the daemon may take to answer
SETTLE_S = 0.5  # a daemon that detaches may not be seen for a moment
REGISTER_S = 10.0  # longest that a worker that is up may be missing from the daemon's list
QUIT_S = 5  # whole seconds that servers have to end in peace
FORCE_S = 2.0  # from SIGTERM to SIGKILL
SMI_S = 30.0  # nvidia-smi takes seconds where the driver is not loaded yet
SOCKET_BYTES = 107  # longest path of a unix socket: sun_path of unix(7), less its final zero
LOG_LINES = 3


class NoAnswerError(RunError):
    """The daemon did not answer a command, or refused it."""


@dataclass(frozen=True)
class RunningDaemon:
    """A daemon that is there already. ``pid`` is None where it runs outside this container."""

    pid: int | None
    user: str
    pipe_directory: Path

    def __str__(self) -> str:
        process = "outside this container" if self.pid is None else f"process {self.pid}"
        return f"MPS daemon of user {self.user} ({process}, pipes in {self.pipe_directory})"


@dataclass(frozen=True)
class Gpu:
    """The GPU of a run: ``uuids`` are of the visible GPUs up to it, as CUDA numbers them, its own last."""

    uuids: tuple[str, ...]
    name: str
    capability: tuple[int, int]
    compute_mode: str


@dataclass(frozen=True)
class MpsDaemon:
    """A daemon that answers. ``environment`` makes a process its client; ``started`` is of :func:`start_ticks`."""

    kind: Literal["private", "existing"]
    pipe_directory: Path
    log_directory: Path
    pid: int | None  # None: it cannot be seen from here
    started: int | None
    environment: dict[str, str]

    def worker_environment(self, spec: WorkerSpec, config: EngineConfig) -> dict[str, str]:
        """What makes the worker of ``spec`` a client with its share, or, with share none, with the whole device."""
        below = config.decode_priority and spec.role == "prefill"
        return {
            **self.environment,
            PERCENTAGE: str(thread_percentage(spec, config.share)),
            PRIORITY: str(BELOW_NORMAL if below else NORMAL),
        }

    def clients(self) -> set[int]:
        """Process ids of the clients of all its servers. Raises :class:`RunError` if the daemon does not answer."""
        servers = _numbers(_ask(self.pipe_directory, "get_server_list"))
        return {pid for server in servers for pid in _numbers(_ask(self.pipe_directory, f"get_client_list {server}"))}

    def wait_for_clients(self, pids: Mapping[str, int]) -> None:
        """Return when all of ``pids`` (by worker) are clients. Raises :class:`RunError` that names those that are not."""
        deadline = time.monotonic() + REGISTER_S
        while True:
            if fault := self.find_fault():
                raise RunError(fault)
            clients = self.clients()
            missing = [f"{name} (process {pid})" for name, pid in pids.items() if pid not in clients]
            if not missing:
                return
            if time.monotonic() > deadline:
                outside = self.kind == "existing" and self.pid is None
                why = "; a daemon outside this container counts process ids of its own" if outside else ""
                logs = log_tail(self.log_directory)
                raise RunError(f"not on the MPS server: {', '.join(missing)}{why}; its logs end: {logs}")
            time.sleep(0.1)

    def find_fault(self) -> str | None:
        """That the daemon has died, and what its logs say; None while it lives."""
        if self.pid is None or start_ticks(self.pid) == self.started:
            return None
        return f"the MPS daemon (process {self.pid}) has died; its logs end: {log_tail(self.log_directory)}"


def thread_percentage(spec: WorkerSpec, share: str) -> int:
    """The MPS active-thread percentage that stands for a worker's share; all of it with ``share`` none."""
    return 100 if share == "none" else max(1, round(spec.share))


def gpu_index(device: str) -> int:
    """The GPU, as CUDA numbers them, that ``auto``, ``cuda`` or ``cuda:N`` names. Raises :class:`InputError` on others."""
    named = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if not named:
        raise InputError(
            f"mode mps: needs an NVIDIA GPU, and device is '{device}'; give cuda or cuda:N, or use mode mp"
        )
    return int(named[1] or 0)


def find_problem(device: str) -> str | None:
    """Return why mode ``mps`` cannot run on ``device`` of this machine, in one line; None if nothing speaks against it.
    Does not initialise CUDA in this process. Raises :class:`InputError` for a device that is no GPU."""
    found = inspect_gpu(gpu_index(device))
    return found if isinstance(found, str) else None


def inspect_gpu(device_index: int) -> Gpu | str:
    """The GPU with what MPS depends on, or why mode ``mps`` cannot run on it."""
    if problem := _machine_problem():
        return problem
    gpus = _probe()
    if isinstance(gpus, str):
        return f"CUDA cannot be used: {gpus}"
    if device_index >= len(gpus):
        return f"there is no GPU {device_index}: CUDA sees {len(gpus)}, numbered from 0"
    gpu = gpus[device_index]
    if gpu.capability < (7, 0):
        return f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, and MPS shares need 7.0 (Volta)"
    if gpu.compute_mode == "PROHIBITED":
        return f"{gpu.name} is in compute mode PROHIBITED (nvidia-smi -c DEFAULT, as root, changes it)"
    return gpu


def _machine_problem() -> str | None:
    if problem := find_children_problem():
        return problem
    if sys.platform != "linux":
        return f"NVIDIA MPS runs on Linux, and this is {platform.system()}"
    if "microsoft" in platform.release().lower():
        return "NVIDIA MPS runs on Linux itself, and this is Linux under Windows (WSL)"
    if Path("/etc/nv_tegra_release").exists():
        return "the workers share memory by CUDA IPC, which NVIDIA's MPS does not support on Tegra"
    if not Path("/dev/nvidiactl").exists():
        return "there is no NVIDIA GPU here (no /dev/nvidiactl)"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if shutil.which(CONTROL) is None:
        return f"{CONTROL} is not on PATH; it comes with the NVIDIA driver (on Ubuntu in nvidia-compute-utils)"
    return None


def running_daemon() -> RunningDaemon | None:
    """The daemon that a process of this environment would become a client of; a private one of a run is never that."""
    pipes = Path(os.environ.get(PIPES) or DEFAULT_PIPES)
    try:
        owner = (pipes / "control").stat().st_uid
        pid = _recorded_pid(pipes)
        if pid is not None:
            owner = Path(f"/proc/{pid}").stat().st_uid
        else:
            _ask(pipes, "get_server_list")
    except (OSError, NoAnswerError):
        return None
    return RunningDaemon(pid, _user(owner), pipes)


@contextmanager
def mps_daemon(existing: bool, exclusive: bool, device_index: int) -> Iterator[MpsDaemon]:
    """The daemon that is there already if ``existing``, else one of this run alone, which ends with the block.

    ``exclusive`` puts the GPU into compute mode EXCLUSIVE_PROCESS until the block ends. Raises :class:`InputError` if MPS
    cannot run here, or a daemon is there without ``existing``, and :class:`RunError` if a daemon does not come up.
    """
    gpu = inspect_gpu(device_index)
    if isinstance(gpu, str):
        raise InputError(f"mode mps: {gpu}; use mode mp")
    for directory in _left_behind():
        _remove(directory)
    there = running_daemon()
    if existing:
        yield _existing(there)
        return
    if there:
        raise InputError(f"an {there} is there already; use it with --mps existing, or have it stopped")
    joins = exclusive or gpu.compute_mode == "EXCLUSIVE_PROCESS"
    if joins and torch.cuda.is_initialized():
        raise InputError(
            "mode mps: this process has initialised CUDA already, too late to join a daemon, which a GPU in compute mode "
            "EXCLUSIVE_PROCESS takes; start from a fresh process"
        )
    directory = _make_directory()
    try:
        if exclusive:
            _make_exclusive(gpu.uuids[-1], directory)
        daemon = _start(directory, gpu)
        with environment(**daemon.environment) if joins else nullcontext():
            yield daemon
    finally:
        _remove(directory)


def _existing(there: RunningDaemon | None) -> MpsDaemon:
    if there is None:
        pipes = os.environ.get(PIPES) or DEFAULT_PIPES
        raise InputError(f"--mps existing: no MPS daemon answers in {pipes}; start one there, or use --mps private")
    _ask(there.pipe_directory, "get_server_list")
    logs = Path(os.environ.get(LOGS) or DEFAULT_LOGS)
    started = None if there.pid is None else start_ticks(there.pid)
    return MpsDaemon(
        "existing", there.pipe_directory, logs, there.pid, started, {PIPES: str(there.pipe_directory), LOGS: str(logs)}
    )


# -- a private daemon: its directory, start and end


def _runtime_directories() -> list[Path]:
    """Where private directories may lie, the preferred first."""
    parents = [Path(tempfile.gettempdir()), Path("/tmp")]  # the latter is short, whatever TMPDIR says
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given and os.access(given, os.W_OK) and Path(given).stat().st_uid == os.getuid():
        parents.insert(0, Path(given))
    return [parent / f"splitwiser-{os.getuid()}" for parent in parents]


def _owner(pid: int) -> str:
    """A name for process ``pid`` that no other process has, later or in another container."""
    return f"{Path('/proc/self/ns/pid').stat().st_ino}-{pid}-{start_ticks(pid)}"


def _make_directory() -> Path:
    """A new private directory, where its sockets' paths are short enough."""
    prefix = f"{_owner(os.getpid())}-"
    socket_bytes = len(f"/{prefix}12345678/pipe/control_privileged")
    base = next(each for each in _runtime_directories() if len(os.fsencode(each)) + socket_bytes <= SOCKET_BYTES)
    base.mkdir(mode=0o700, exist_ok=True)
    found = base.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise InputError(
            f"{base} belongs to user {_user(found.st_uid)}; set XDG_RUNTIME_DIR or TMPDIR to a place of yours"
        )
    return Path(tempfile.mkdtemp(prefix=prefix, dir=base))


def _left_behind() -> list[Path]:
    """Private directories whose owner has died."""
    namespace = _owner(os.getpid()).partition("-")[0]
    found = []
    for base in dict.fromkeys(_runtime_directories()):
        for directory in base.glob(f"{namespace}-*-*-*"):
            pid = directory.name.split("-")[1]
            if pid.isdecimal() and not directory.name.startswith(f"{_owner(int(pid))}-"):
                found.append(directory)
    return found


def _start(directory: Path, gpu: Gpu) -> MpsDaemon:
    pipes, logs = directory / "pipe", directory / "log"
    pipes.mkdir()
    logs.mkdir()
    clients = {PIPES: str(pipes), LOGS: str(logs), "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuids)}
    inherited = {name: value for name, value in os.environ.items() if name != PERCENTAGE}  # it would cap every client

    def fault(what: str) -> RunError:
        return RunError(f"{CONTROL} -d {what}; its logs end: {log_tail(logs)}")

    with (logs / "start.log").open("wb") as output:  # a pipe would stay open as long as the daemon
        try:
            done = subprocess.run(
                [CONTROL, "-d"], env=inherited | clients, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                timeout=START_S, start_new_session=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise fault(f"did not come back within {START_S:g} s") from error
        except OSError as error:
            raise fault(f"cannot be run ({error})") from error
    if done.returncode:
        raise fault(f"ended with exit code {done.returncode}")
    began = time.monotonic()
    while True:
        try:
            _ask(pipes, "get_server_list")
            break
        except NoAnswerError as error:
            waited_s = time.monotonic() - began
            if waited_s > SETTLE_S and not _processes(pipes):
                raise fault("died as it started") from error
            if waited_s > START_S:
                raise fault(f"did not answer within {START_S:g} s ({error})") from error
        time.sleep(0.05)
    running = _processes(pipes)
    pid = min(running, key=running.__getitem__, default=None)  # the oldest: it started its servers
    return MpsDaemon("private", pipes, logs, pid, running[pid] if pid else None, clients)


@uninterrupted()
def _remove(directory: Path) -> None:
    """End the daemon of ``directory``, put the compute mode back and remove the directory. Never raises: it runs on every
    way out, and says on stderr what it could not do."""
    pipes = directory / "pipe"
    running = _processes(pipes)
    if running or (pipes / "control").exists():
        try:
            _ask(pipes, f"quit -t {QUIT_S}", QUIT_S + COMMAND_S)
        except NoAnswerError as error:
            if running:
                print(f"splitwiser: the MPS daemon is ended by force: {error}", file=sys.stderr)
        left = _wait_until_gone(pipes, FORCE_S)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in left:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            left = _wait_until_gone(pipes, FORCE_S)
        if left:
            names = ", ".join(map(str, left))
            print(f"splitwiser: MPS processes {names} do not end; the next start tries again", file=sys.stderr)
            return
    try:
        _restore_compute_mode(directory)
    except InputError as error:
        print(f"splitwiser: {error}", file=sys.stderr)
        return
    shutil.rmtree(directory, ignore_errors=True)


def _wait_until_gone(pipes: Path, timeout_s: float) -> dict[int, int]:
    """The processes over ``pipes`` that are left when none is, or after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while (left := _processes(pipes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _processes(pipes: Path) -> dict[int, int]:
    """Daemon, servers and front ends over ``pipes``: process ids with their start ticks. Each is known by its command and
    its environment, or by the daemon's pid file, so that no process of somebody else's is ever taken for one."""
    recorded = _recorded_pid(pipes)
    variable = f"{PIPES}={pipes}".encode()
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        try:
            if pid != recorded and not (
                b"nvidia-cuda-mps" in (entry / "cmdline").read_bytes()
                and variable in (entry / "environ").read_bytes().split(b"\0")
            ):
                continue
        except OSError:  # ended meanwhile, or of another user
            continue
        ticks = start_ticks(pid)
        if ticks is not None:
            found[pid] = ticks
    return found


def _recorded_pid(pipes: Path) -> int | None:
    """The process id in the daemon's pid file, if that is a daemon, which it is not after a kill or from a container."""
    try:
        pid = int((pipes / f"{CONTROL}.pid").read_text(encoding="ascii"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if CONTROL.encode() in command else None


def _ask(pipes: Path, command: str, timeout_s: float | None = None) -> str:
    """The daemon's answer to ``command``. Raises :class:`NoAnswerError`."""
    timeout_s = COMMAND_S if timeout_s is None else timeout_s
    try:
        done = subprocess.run(
            [CONTROL], env={**os.environ, PIPES: str(pipes)}, input=f"{command}\n", capture_output=True, text=True,
            errors="replace", timeout=timeout_s, start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(f"the MPS daemon did not answer '{command}' within {timeout_s:g} s") from error
    except OSError as error:
        raise NoAnswerError(f"{CONTROL} cannot be run: {error}") from error
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split()) or f"exit code {done.returncode}"
        raise NoAnswerError(f"the MPS daemon refused '{command}': {said}")
    return done.stdout


def _numbers(answer: str) -> list[int]:
    return [int(word) for word in answer.split() if word.isdecimal()]


def log_tail(directory: Path) -> str:
    """The last lines of the daemon's logs, on one line."""
    ends = []
    for name in ("start.log", "control.log", "server.log"):
        try:
            lines = (directory / name).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        lines = [line.strip() for line in lines if line.strip()]
        if lines:
            ends.append(f"{name}: {' / '.join(lines[-LOG_LINES:])}")
    return "; ".join(ends) or "nothing was logged"


# -- the GPU


def _probe() -> list[Gpu] | str:
    """The GPUs that CUDA sees, or why it sees none."""
    command = [sys.executable, str(Path(__file__).parents[1] / "machine" / "cuda_probe.py")]
    try:  # without a daemon, even where one is there: it may count the devices anew, or be another user's
        done = subprocess.run(
            command, env={**os.environ, PIPES: os.devnull}, capture_output=True, text=True, timeout=SMI_S, check=True
        )
        answer = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return first_line(error)
    if "error" in answer:
        return str(answer["error"])
    uuids = [gpu["uuid"] for gpu in answer["gpus"]]
    return [
        Gpu(tuple(uuids[: index + 1]), gpu["name"], tuple(gpu["capability"]), gpu["compute_mode"])
        for index, gpu in enumerate(answer["gpus"])
    ]


def _make_exclusive(uuid: str, directory: Path) -> None:
    found = _nvidia_smi("-i", uuid, "--query-gpu=compute_mode", "--format=csv,noheader").strip()
    if found.upper() == "EXCLUSIVE_PROCESS":
        return
    note = directory / "compute_mode"  # written first: should this run be killed, the next start puts the mode back
    note.write_text(f"{uuid} {found.upper()}", encoding="ascii")
    try:
        _nvidia_smi("-i", uuid, "-c", "EXCLUSIVE_PROCESS")
    except InputError:
        note.unlink()
        raise


def _restore_compute_mode(directory: Path) -> None:
    note = directory / "compute_mode"
    if note.exists():
        uuid, mode = note.read_text(encoding="ascii").split()
        _nvidia_smi("-i", uuid, "-c", mode)
        note.unlink()


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            timeout=SMI_S,
            start_new_session=True,
            check=False,
        )
        said = " ".join((done.stdout + done.stderr).split())
        if not done.returncode:
            return done.stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = first_line(error)
    raise InputError(
        f"--exclusive: 'nvidia-smi {' '.join(arguments)}' failed ({said}); changing the compute mode needs root"
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
