"""Environment, signals and processes, as Linux gives them."""

import ctypes
import mmap
import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

_LONGEST_TMPDIR = 70  # what multiprocessing adds takes up to 37 bytes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """This process's environment with ``variables``, until the block ends."""
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
    """Hold Ctrl-C and SIGTERM back until the block has ended; then the first that was held does what it does, unless an
    exception is on its way already. The first ``after`` of them are not held, and from then on the block must have a
    deadline. Outside the main thread, which alone is interrupted, nothing is held."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def take(number: int, frame: FrameType | None) -> None:
        held = len(came) >= after  # told first: a second signal may come in the middle of this
        came.append(number)
        handler = before[signal.Signals(number)]
        if not held and callable(handler):
            handler(number, frame)

    try:
        for number in before:
            signal.signal(number, take)
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is take:  # a handler may have put another in its place
                signal.signal(number, handler or signal.SIG_DFL)
    if came[after:]:
        signal.raise_signal(came[after])


def start_ticks(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks since boot, which tells it from a later one of the same id; None if it
    has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # proc_pid_stat(5): state is field 3, starttime field 22


def find_children_problem() -> str | None:
    """Why this process cannot start worker processes; None if it can."""
    if multiprocessing.current_process().daemon:
        return (
            "needs worker processes, which a daemonic process (such as a worker of multiprocessing.Pool) cannot start"
        )
    return None


def has_home() -> bool:
    """Whether this user has a home folder; a container's user id need not have an entry in passwd."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True


def home_folder(variable: str) -> Path:
    """This user's home folder, to keep compiled functions in. Raises FileNotFoundError, which names the environment
    ``variable`` that says where else, for a user without one."""
    if not has_home():
        raise FileNotFoundError(f"there is no home folder to keep it; set {variable}")
    return Path.home()


def shorten_socket_paths() -> None:
    """Have multiprocessing keep its sockets under /tmp where TMPDIR is too long for them: a socket's path has 107 bytes."""
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
        kept, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()  # made once a process, and inherited by its children
        finally:
            tempfile.tempdir = kept


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees for what it allocates next. Otherwise it gives the tens of megabytes
    between two layers back to the system, which zeroes them anew: a tenth of a prefill step's time."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if set_option is not None:
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)
        set_option(_M_MMAP_THRESHOLD, 2**25)  # the most that it takes


def use_huge_pages(memory: mmap.mmap) -> None:
    """Ask for pages of 2 MiB where the system has them for such memory: the first use of a page costs microseconds, which a
    prefill step would pay for every 4 KiB that it writes into a new pool."""
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
