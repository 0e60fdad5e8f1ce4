"""A worker's share of a CPU: how many threads its steps use, at most as many as there is processor time for."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch

from splitwiser.engine.messages import WorkerSpec
from splitwiser.machine.fair_share import FairShare
from splitwiser.placement.shares import WorkerShare


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
