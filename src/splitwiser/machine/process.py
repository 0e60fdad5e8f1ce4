"""Environment variables, signals and processes of Linux."""

import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_LONGEST_TMPDIR = 70  # in bytes; multiprocessing appends up to 37


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment ``variables`` of this process until the block ends."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def uninterrupted(after: int = 0) -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM until the block ends; then the first deferred one is delivered, unless the block raised.

    The first ``after`` signals are delivered at once; after them the block must end within limited time. Does nothing
    outside the main thread, the only one that is interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, frame: FrameType | None) -> None:
        deferred = len(received) >= after  # evaluated first: a second signal may interrupt this
        received.append(number)
        handler = before[signal.Signals(number)]
        if not deferred and callable(handler):
            handler(number, frame)

    try:
        for number in before:
            signal.signal(number, receive)
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is receive:  # a handler may have replaced it
                signal.signal(number, handler or signal.SIG_DFL)
    if received[after:]:
        signal.raise_signal(received[after])


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Make a folder for temporary files, which is deleted when the block ends or, even if by SIGKILL, this process."""
    with tempfile.TemporaryDirectory(prefix="splitwiser-") as folder:
        # its input ends when this process has ended, whose end of the pipe no other process has
        command = ["sh", "-c", 'cat; rm -rf -- "$0"', folder]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as remover:
            try:
                yield folder
            finally:
                remover.kill()


def start_ticks(pid: int) -> int | None:
    """Return the start time of process ``pid`` in clock ticks since boot, or None if it has ended. Together with ``pid``, it
    identifies the process, since ids are reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # proc_pid_stat(5): state is field 3, starttime field 22


def find_children_problem() -> str | None:
    """Return why this process cannot start worker processes, or None if it can."""
    if multiprocessing.current_process().daemon:
        return (
            "needs worker processes, which a daemonic process (such as a worker of multiprocessing.Pool) cannot start"
        )
    return None


def has_home() -> bool:
    """Return whether this user has a home folder; a container's user id may have no entry in passwd."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True


def home_folder(variable: str) -> Path:
    """Return this user's home folder, for a cache of compiled functions. Raises FileNotFoundError for a user without one,
    naming the environment ``variable`` that chooses another folder."""
    if not has_home():
        raise FileNotFoundError(f"there is no home folder to keep it; set {variable}")
    return Path.home()


def shorten_socket_paths() -> None:
    """Make multiprocessing keep its sockets in /tmp if TMPDIR is too long: a socket's path has at most 107 bytes."""
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
        saved, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()  # created once per process, and inherited by its children
        finally:
            tempfile.tempdir = saved
