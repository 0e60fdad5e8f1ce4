"""Mode ``mps``: start, supervision and end of the NVIDIA MPS daemon that serves the workers.

The code relies on these facts from NVIDIA's MPS documentation (docs.nvidia.com/deploy/mps) and the manual page
nvidia-cuda-mps-control(1):

* A process looks for its daemon, in ``CUDA_MPS_PIPE_DIRECTORY``, when it initialises CUDA, and runs without MPS if it finds
  none; so only the daemon can tell whether a process is a client. ``CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`` is read then, too.
* CUDA IPC works between clients and other processes. So the parent, which allocates weights and KV pool and launches
  nothing after that, does not become a client: a client lasts as long as its process, and the daemon could not quit
  cleanly before the parent ends. Only a GPU in compute mode EXCLUSIVE_PROCESS, which admits a single process, the MPS
  server, makes the parent a client.
* A daemon with ``CUDA_VISIBLE_DEVICES`` renumbers those devices for its clients. UUIDs are valid for both.
* ``quit -t SECONDS`` lets clients finish, then ends the servers, and returns when the daemon has ended. A client that ends
  while its kernels run can hang the server, so the workers are stopped first.
"""

import os
import pwd
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
from splitwiser.errors import InputError, RunError
from splitwiser.machine.process import environment, start_ticks, uninterrupted
from splitwiser.placement import mps_gpu
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.mps_gpu import CONTROL, PIPES

LOGS = "CUDA_MPS_LOG_DIRECTORY"
PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PRIORITY, NORMAL, BELOW_NORMAL = "CUDA_MPS_CLIENT_PRIORITY", 0, 1
DEFAULT_PIPES, DEFAULT_LOGS = "/tmp/nvidia-mps", "/var/log/nvidia-mps"

COMMAND_S = 5.0  # longest that a command to the daemon may take
START_S = 10.0  # longest that the daemon may take to answer
SETTLE_S = 0.5  # a daemon that detaches may be invisible for a moment
REGISTER_S = 10.0  # longest that a ready worker may be missing from the daemon's list
QUIT_S = 5  # whole seconds that servers have to end by themselves
FORCE_S = 2.0  # from SIGTERM to SIGKILL
SOCKET_BYTES = 107  # longest path of a unix socket: sun_path of unix(7), less its final zero
LOG_LINES = 3


class NoAnswerError(RunError):
    """The daemon did not answer a command, or refused it."""


@dataclass(frozen=True)
class RunningDaemon:
    """A daemon that is already running. ``pid`` is None if it runs outside this container."""

    pid: int | None
    user: str
    pipe_directory: Path

    def __str__(self) -> str:
        process = "outside this container" if self.pid is None else f"process {self.pid}"
        return f"MPS daemon of user {self.user} ({process}, pipes in {self.pipe_directory})"


@dataclass(frozen=True)
class MpsDaemon:
    """A running daemon. ``environment`` makes a process its client; ``started`` is its :func:`start_ticks`."""

    kind: Literal["private", "existing"]
    pipe_directory: Path
    log_directory: Path
    pid: int | None  # None if it is not visible from here
    started: int | None
    environment: dict[str, str]

    def worker_environment(self, spec: WorkerSpec, config: EngineConfig) -> dict[str, str]:
        """Return the environment that makes the worker of ``spec`` a client with its share of the device."""
        below = config.decode_priority and spec.role == "prefill"
        return {
            **self.environment,
            PERCENTAGE: str(thread_percentage(spec, config.share)),
            PRIORITY: str(BELOW_NORMAL if below else NORMAL),
        }

    def clients(self) -> set[int]:
        """Return the process ids of the clients of all servers. Raises :class:`RunError` if the daemon does not answer."""
        servers = _numbers(_ask(self.pipe_directory, "get_server_list"))
        return {pid for server in servers for pid in _numbers(_ask(self.pipe_directory, f"get_client_list {server}"))}

    def wait_for_clients(self, pids: Mapping[str, int]) -> None:
        """Wait until all of ``pids`` (by worker) are clients. Raises :class:`RunError`, with the missing ones, after
        :data:`REGISTER_S`."""
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
                why = "; a daemon outside this container uses other process ids" if outside else ""
                logs = log_tail(self.log_directory)
                raise RunError(f"not on the MPS server: {', '.join(missing)}{why}; its logs end: {logs}")
            time.sleep(0.1)

    def find_fault(self) -> str | None:
        """Return that the daemon has died, with the end of its logs, or None while it is alive."""
        if self.pid is None or start_ticks(self.pid) == self.started:
            return None
        return f"the MPS daemon (process {self.pid}) has died; its logs end: {log_tail(self.log_directory)}"


def thread_percentage(spec: WorkerSpec, share: str) -> int:
    """Return the MPS active-thread percentage for a worker's share; 100 with ``share`` none."""
    return 100 if share == "none" else max(1, round(spec.share))


def running_daemon() -> RunningDaemon | None:
    """Return the daemon that a process with this environment would be a client of, or None; never a run's private one."""
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
    """Provide the daemon that is already running if ``existing``, else a private one that ends with the block.

    ``exclusive`` puts the GPU into compute mode EXCLUSIVE_PROCESS until the block ends. Raises :class:`InputError` if MPS
    cannot run here, or if a daemon is already running without ``existing``, and :class:`RunError` if a daemon does not
    start.
    """
    gpu = mps_gpu.inspect_gpu(device_index)
    if isinstance(gpu, str):
        raise InputError(f"mode mps: {gpu}; use mode mp")
    for directory in _left_behind():
        _remove(directory)
    running = running_daemon()
    if existing:
        yield _use_existing(running)
        return
    if running:
        raise InputError(f"an {running} is already running; use it with --mps existing, or have it stopped")
    parent_is_client = exclusive or gpu.compute_mode == "EXCLUSIVE_PROCESS"
    if parent_is_client and torch.cuda.is_initialized():
        raise InputError(
            "mode mps: this process has initialised CUDA already, too late to become a client of a daemon, as a GPU in "
            "compute mode EXCLUSIVE_PROCESS requires; start from a fresh process"
        )
    directory = _make_directory()
    try:
        if exclusive:
            mps_gpu.make_exclusive(gpu.uuids[-1], directory)
        daemon = _start(directory, gpu)
        with environment(**daemon.environment) if parent_is_client else nullcontext():
            yield daemon
    finally:
        _remove(directory)


def _use_existing(running: RunningDaemon | None) -> MpsDaemon:
    if running is None:
        where = os.environ.get(PIPES) or DEFAULT_PIPES
        raise InputError(f"--mps existing: no MPS daemon answers in {where}; start one there, or use --mps private")
    pipes = running.pipe_directory
    _ask(pipes, "get_server_list")
    logs = Path(os.environ.get(LOGS) or DEFAULT_LOGS)
    started = None if running.pid is None else start_ticks(running.pid)
    return MpsDaemon("existing", pipes, logs, running.pid, started, {PIPES: str(pipes), LOGS: str(logs)})


# -- a private daemon: its directory, start and end


def _runtime_directories() -> list[Path]:
    """Return the possible parents of private directories, the preferred one first."""
    parents = [Path(tempfile.gettempdir()), Path("/tmp")]  # /tmp is short, whatever TMPDIR is
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given and os.access(given, os.W_OK) and Path(given).stat().st_uid == os.getuid():
        parents.insert(0, Path(given))
    return [parent / f"splitwiser-{os.getuid()}" for parent in parents]


def _owner(pid: int) -> str:
    """Return a name for process ``pid`` that no other process has, not even later or in another container."""
    return f"{Path('/proc/self/ns/pid').stat().st_ino}-{pid}-{start_ticks(pid)}"


def _make_directory() -> Path:
    """Create a private directory, in a place where the paths of its sockets are short enough."""
    prefix = f"{_owner(os.getpid())}-"
    socket_bytes = len(f"/{prefix}12345678/pipe/control_privileged")
    base = next(each for each in _runtime_directories() if len(os.fsencode(each)) + socket_bytes <= SOCKET_BYTES)
    base.mkdir(mode=0o700, exist_ok=True)
    found = base.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise InputError(
            f"{base} belongs to user {_user(found.st_uid)}; set XDG_RUNTIME_DIR or TMPDIR to a directory of your own"
        )
    return Path(tempfile.mkdtemp(prefix=prefix, dir=base))


def _left_behind() -> list[Path]:
    """Return private directories whose owner has died."""
    namespace = _owner(os.getpid()).partition("-")[0]
    found = []
    for base in dict.fromkeys(_runtime_directories()):
        for directory in base.glob(f"{namespace}-*-*-*"):
            pid = directory.name.split("-")[1]
            if pid.isdecimal() and not directory.name.startswith(f"{_owner(int(pid))}-"):
                found.append(directory)
    return found


def _start(directory: Path, gpu: mps_gpu.Gpu) -> MpsDaemon:
    """Start a private daemon in ``directory`` and wait until it answers. Raises :class:`RunError`."""
    pipes, logs = directory / "pipe", directory / "log"
    pipes.mkdir()
    logs.mkdir()
    clients = {PIPES: str(pipes), LOGS: str(logs), "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuids)}
    inherited = {name: value for name, value in os.environ.items() if name != PERCENTAGE}  # it would limit every client

    def fault(what: str) -> RunError:
        return RunError(f"{CONTROL} -d {what}; its logs end: {log_tail(logs)}")

    with (logs / "start.log").open("wb") as output:  # a pipe would stay open as long as the daemon runs
        try:
            done = subprocess.run(
                [CONTROL, "-d"], env=inherited | clients, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                timeout=START_S, start_new_session=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise fault(f"did not return within {START_S:g} s") from error
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
    pid = min(running, key=running.__getitem__, default=None)  # the oldest, which started its servers
    return MpsDaemon("private", pipes, logs, pid, running[pid] if pid else None, clients)


@uninterrupted()
def _remove(directory: Path) -> None:
    """End the daemon of ``directory``, restore the compute mode and remove the directory.

    Never raises, since it runs at every kind of exit; prints to stderr what could not be done.
    """
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
        mps_gpu.restore_compute_mode(directory)
    except InputError as error:
        print(f"splitwiser: {error}", file=sys.stderr)
        return
    shutil.rmtree(directory, ignore_errors=True)


def _wait_until_gone(pipes: Path, timeout_s: float) -> dict[int, int]:
    """Wait until no process of the daemon of ``pipes`` is left, at most ``timeout_s`` seconds; return those left."""
    deadline = time.monotonic() + timeout_s
    while (left := _processes(pipes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _processes(pipes: Path) -> dict[int, int]:
    """Return the start ticks of daemon, servers and front ends of ``pipes``, by process id.

    A process is recognised by its command and its environment, or by the daemon's pid file, so that no unrelated process
    is ever taken for one of them.
    """
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
        except OSError:  # it has ended, or belongs to another user
            continue
        ticks = start_ticks(pid)
        if ticks is not None:
            found[pid] = ticks
    return found


def _recorded_pid(pipes: Path) -> int | None:
    """Return the process id in the daemon's pid file, or None if no daemon has it: after a kill, or in another container."""
    try:
        pid = int((pipes / f"{CONTROL}.pid").read_text(encoding="ascii"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if CONTROL.encode() in command else None


def _ask(pipes: Path, command: str, timeout_s: float | None = None) -> str:
    """Send ``command`` to the daemon and return its answer. Raises :class:`NoAnswerError`."""
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
        reason = " ".join((done.stdout + done.stderr).split()) or f"exit code {done.returncode}"
        raise NoAnswerError(f"the MPS daemon refused '{command}': {reason}")
    return done.stdout


def _numbers(answer: str) -> list[int]:
    return [int(word) for word in answer.split() if word.isdecimal()]


def log_tail(directory: Path) -> str:
    """Return the last lines of the daemon's logs, joined to one line."""
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


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
