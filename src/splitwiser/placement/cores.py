"""A worker's share of a CPU: how many threads its steps use, at most as many as there is processor time for."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch

from splitwiser.engine.messages import WorkerSpec
from splitwiser.machine.fair_share import FairShare
from splitwiser.placement.shares import Board, WorkerShare

SECOND_LANE_NICE = 10  # a second lane's niceness: a tenth of the weight that the kernel gives to other threads


def plan_threads(workers: Sequence[WorkerSpec], cores: int) -> list[int]:
    """Return the number of threads of each worker: its share of ``cores``, rounded, but at least one."""
    return [max(1, round(worker.share * cores / 100)) for worker in workers]


def plan_levels(workers: Sequence[WorkerSpec], cores: int, share: str) -> list[list[int]]:
    """Return the number of threads of each worker, by level and worker.

    ``share`` none has one level, with all ``cores`` for every worker; fixed has one, by the workers' shares; auto has a
    level for each division of the cores between prefill and decode.
    """
    if share == "none":
        return [[cores for _ in workers]]
    if share == "fixed":
        return [plan_threads(workers, cores)]
    counts = {role: sum(worker.role == role for worker in workers) for role in ("prefill", "decode")}
    levels = []
    for decode in range(counts["decode"], max(cores - counts["prefill"], counts["decode"]) + 1):
        units = {"decode": decode, "prefill": max(cores - decode, counts["prefill"])}
        levels.append([units[worker.role] // counts[worker.role] for worker in workers])
    return levels


def plan_cores(workers: Sequence[WorkerSpec], cores: Sequence[int]) -> list[set[int]]:
    """Return the cores of each worker where none are lent: one per thread and disjoint, or all cores for every worker if
    there are fewer cores than threads."""
    threads = plan_threads(workers, len(cores))
    if sum(threads) > len(cores):
        return [set(cores) for _ in workers]
    ends = list(accumulate(threads))
    return [set(cores[end - count : end]) for count, end in zip(threads, ends, strict=True)]


def claim_threads(share: WorkerShare, levels: Sequence[Sequence[int]], cores: int) -> int:
    """Mark the worker of ``share`` as busy; return its number of threads at the current level, with those lent to it."""
    level, lent = share.claim()
    threads = levels[level]
    own = threads[share.worker]
    count = own + sum(others for others, is_lent in zip(threads, lent, strict=True) if is_lent)
    return min(count, max(cores, own))


class CpuShare:
    """A worker's :class:`~splitwiser.engine.worker.DeviceShare` on a CPU: sets the number of PyTorch's threads before each
    step, to the worker's own and those lent to it, limited by its :class:`~splitwiser.machine.fair_share.FairShare`."""

    def __init__(self, share: WorkerShare, levels: Sequence[Sequence[int]], cores: int, on_cpu: bool = True) -> None:
        self._share = share
        self._levels = levels
        self._cores = cores
        self._fair_share = FairShare(on_cpu)
        self._set = 0

    def use(self) -> AbstractContextManager[object]:
        """See :meth:`splitwiser.engine.worker.DeviceShare.use`."""
        self.before_step()
        return nullcontext()

    def release(self) -> None:
        """See :meth:`splitwiser.engine.worker.DeviceShare.release`."""
        self._share.release()

    def before_step(self) -> int:
        """Mark the worker as busy and set the number of threads; returns it."""
        count = self._fair_share.threads(claim_threads(self._share, self._levels, self._cores))
        if count != self._set:
            torch.set_num_threads(count)
            self._set = count
        return count


class SecondLane:
    """A second lane of a prefill worker for a backlog, that is while more prompt tokens wait than a step takes.

    A thread of low priority runs prefill steps of its own (``run_step``, which returns whether there was one), on
    ``threads`` threads, in the time that :class:`Pace` leaves. Steps that wait for each other nowhere use such time better
    than threads of one step do, which wait for the slowest. Once open, the lane goes on until no prompt waits. ``on_error``
    is called, while the exception is handled, if a step fails.
    """

    def __init__(
        self, run_step: Callable[[], bool], board: Board, threads: int, on_error: Callable[[BaseException], None]
    ) -> None:
        self._run_step = run_step
        self._board = board
        self._threads = threads
        self._on_error = on_error
        self._opened = threading.Event()
        threading.Thread(target=self._run, name="second lane", daemon=True).start()

    def open(self) -> None:
        """Let the lane run; called where there is a backlog."""
        self._opened.set()

    def _run(self) -> None:
        try:
            nice = max(SECOND_LANE_NICE, os.getpriority(os.PRIO_PROCESS, 0))  # which nobody may lower again
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)  # of this thread alone, on Linux
            torch.set_num_threads(self._threads)
            while self._opened.wait():
                self._board.backlog = True
                while self._run_step():
                    pass
                self._board.backlog = False
                self._opened.clear()
        except BaseException as error:
            self._on_error(error)


class Pace:
    """Holds a decode worker to one step every ``itl_s`` seconds while prefill has a backlog: prompts join it meanwhile, and
    fewer, larger steps read the weights less often."""

    def __init__(self, board: Board, itl_s: float) -> None:
        self._board = board
        self._itl_s = itl_s
        self._due_s = 0.0

    def wait(self) -> None:
        """Wait until the next step is due, at most ``itl_s`` seconds."""
        now_s = time.monotonic()
        if self._board.backlog and now_s < self._due_s:
            time.sleep(self._due_s - now_s)
            now_s = self._due_s
        self._due_s = now_s + self._itl_s
