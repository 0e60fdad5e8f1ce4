"""How many threads a process's steps have processors for, while others use them too.

Threads of a step go in lockstep: each waits for the slowest. Where there are more runnable threads than processors, some
are always off their processor, and all wait for them; fewer threads, each of which runs, are then faster. The kernel tells
how long a thread ran and how long it waited for a processor (proc(5), ``/proc/PID/task/TID/schedstat``, in nanoseconds).
"""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

LOOK_S = 0.1  # between two looks
LOOK_PART = 0.01  # the most of the time that looks may take: each reads a short file a thread
RISE_S = 0.3  # how long a share holds before a greater one is believed


class FairShare:
    """The part of its time that this process's threads have run, of that in which they could have.

    Of n threads, n times this part are as many as there is processor time for: with k others on n processors it settles
    where the threads' number is what a fair scheduler gives them. Where steps run on a GPU, all threads stay.
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
        self._next_look_s = self._changed_s = float("-inf")
        self._fixed = not on_cpu or "OMP_NUM_THREADS" in os.environ  # the user's own number

    def threads(self, wanted: int) -> int:
        """Of ``wanted`` threads those to use now: 1 or more."""
        if wanted == 1 or self._fixed:
            return wanted
        now_s = self._clock()
        if now_s >= self._next_look_s:
            self._take(self._read(), now_s)
            self._next_look_s = now_s + max(LOOK_S, (self._clock() - now_s) / LOOK_PART)
        return max(1, int(wanted * self._share + 0.5))

    def _take(self, times: dict[str, tuple[int, int]], now_s: float) -> None:
        """Take in what each thread ran and waited, in ns since it began."""
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
            except OSError:  # it has ended, or this kernel does not tell
                continue
            times[task.name] = int(ran), int(waited)
        return times


class OwnThreads:
    """The :class:`~splitwiser.engine.worker.DeviceShare` of steps in the caller's own thread: of PyTorch's threads as many as their
    :class:`~splitwiser.machine.fair_share.FairShare` comes to. :meth:`leave` sets what was set before."""

    def __init__(self, on_cpu: bool = True) -> None:
        self._share = FairShare(on_cpu)
        self._found: int | None = None

    def use(self) -> AbstractContextManager[object]:
        """See :meth:`splitwiser.engine.worker.DeviceShare.use`."""
        self.before_step()
        return nullcontext()

    def before_step(self) -> None:
        """Set the number of threads for the step to come."""
        now = torch.get_num_threads()
        if self._found is None:
            self._found = now
        count = self._share.threads(self._found)
        if count != now:
            torch.set_num_threads(count)

    def release(self) -> None:
        """See :meth:`splitwiser.engine.worker.DeviceShare.release`."""
        if self._found is not None and self._found != torch.get_num_threads():
            torch.set_num_threads(self._found)
        self._found = None
