"""Number of threads that a process's steps have processors for while other processes use them too.

The threads of a step synchronise, so each waits for the slowest. With more runnable threads than processors, some threads
are always waiting for a processor, and all others wait for them; fewer threads that all run are then faster. The kernel
reports how long a thread ran and how long it waited for a processor (proc(5), ``/proc/PID/task/TID/schedstat``, in ns).
"""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

READ_INTERVAL_S = 0.1  # between two readings
READ_TIME_PART = 0.01  # largest part of the time that readings may take: each reads a short file per thread
RISE_S = 0.3  # how long a share stays before it may rise


class FairShare:
    """Measures which part of the time in which this process's threads were runnable they did run.

    With n threads, there is processor time for n times this part: with k other threads on n processors, it converges to
    the number that a fair scheduler gives. Where steps run on a GPU, the number of threads is not changed.
    """

    def __init__(
        self,
        on_cpu: bool = True,
        tasks: Path = Path("/proc/self/task"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tasks = tasks
        self._clock = clock
        self._share = 1.0
        self._before: dict[str, tuple[int, int]] = {}
        self._next_read_s = self._changed_s = float("-inf")
        self._fixed = not on_cpu or "OMP_NUM_THREADS" in os.environ  # the user's choice

    def threads(self, wanted: int) -> int:
        """Return how many of ``wanted`` threads to use now, at least 1."""
        if wanted == 1 or self._fixed:
            return wanted
        now_s = self._clock()
        if now_s >= self._next_read_s:
            self._update(self._read(), now_s)
            self._next_read_s = now_s + max(READ_INTERVAL_S, (self._clock() - now_s) / READ_TIME_PART)
        return max(1, int(wanted * self._share + 0.5))

    def _update(self, times: dict[str, tuple[int, int]], now_s: float) -> None:
        """Update the share from the time that each thread has run and waited, in ns since its start."""
        earlier = [self._before.get(task, (0, 0)) for task in times]
        ran = sum(now for now, _ in times.values()) - sum(before for before, _ in earlier)
        waited = sum(now for _, now in times.values()) - sum(before for _, before in earlier)
        self._before = times
        if not ran + waited:
            return
        share = ran / (ran + waited)
        if share < self._share or now_s - self._changed_s >= RISE_S:
            self._share, self._changed_s = share, now_s

    def _read(self) -> dict[str, tuple[int, int]]:
        times = {}
        for task in self._tasks.iterdir():
            try:
                ran, waited, _ = (task / "schedstat").read_bytes().split()
            except OSError:  # the thread has ended, or this kernel does not report it
                continue
            times[task.name] = int(ran), int(waited)
        return times


class OwnThreads:
    """The :class:`~splitwiser.engine.worker.DeviceShare` of steps in the caller's own thread: PyTorch's threads, limited by
    a :class:`FairShare`. :meth:`release` restores their number."""

    def __init__(self, on_cpu: bool = True) -> None:
        self._share = FairShare(on_cpu)
        self._original: int | None = None

    def use(self) -> AbstractContextManager[object]:
        """See :meth:`splitwiser.engine.worker.DeviceShare.use`."""
        self.before_step()
        return nullcontext()

    def before_step(self) -> None:
        """Set the number of threads for the next step."""
        now = torch.get_num_threads()
        if self._original is None:
            self._original = now
        count = self._share.threads(self._original)
        if count != now:
            torch.set_num_threads(count)

    def release(self) -> None:
        """See :meth:`splitwiser.engine.worker.DeviceShare.release`."""
        if self._original is not None and self._original != torch.get_num_threads():
            torch.set_num_threads(self._original)
        self._original = None
