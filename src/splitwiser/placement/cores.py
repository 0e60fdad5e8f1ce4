"""A worker's part of a CPU: how many threads its steps use, no more than it has processors for."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch

from splitwiser.engine.messages import WorkerSpec
from splitwiser.machine.fair_share import FairShare
from splitwiser.placement.shares import Part


def plan_threads(workers: Sequence[WorkerSpec], cores: int) -> list[int]:
    """Threads of each worker: its share of ``cores``, rounded, but at least one."""
    return [max(1, round(worker.share * cores / 100)) for worker in workers]


def plan_levels(workers: Sequence[WorkerSpec], cores: int, share: str) -> list[list[int]]:
    """Threads of each worker at each level: one level of shares, or of all ``cores`` for everyone, or for ``auto`` one for
    each way to cut the cores between prefill and decode."""
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
    """The cores of each worker where none are lent: as many as its threads, no core in two workers' hands while there are
    enough; if there are not, every worker may use all."""
    threads = plan_threads(workers, len(cores))
    if sum(threads) > len(cores):
        return [set(cores) for _ in workers]
    ends = list(accumulate(threads))
    return [set(cores[end - count : end]) for count, end in zip(threads, ends, strict=True)]


def take_threads(part: Part, levels: Sequence[Sequence[int]], cores: int) -> int:
    """Take up work; the threads of ``part``'s worker at the level that holds, and those lent to it at this moment."""
    level, lent = part.take()
    threads = levels[level]
    own = threads[part.worker]
    count = own + sum(others for others, is_lent in zip(threads, lent, strict=True) if is_lent)
    return min(count, max(cores, own))


class Threads:
    """A worker's :class:`~splitwiser.engine.worker.Lane` on a CPU. Sets before each step how many threads it uses: of the
    worker's own and those that are lent to it at that moment as many as its
    :class:`~splitwiser.machine.fair_share.FairShare` comes to."""

    def __init__(self, part: Part, levels: Sequence[Sequence[int]], cores: int, on_cpu: bool = True) -> None:
        self._part = part
        self._levels = levels
        self._cores = cores
        self._share = FairShare(on_cpu)
        self._set = 0

    def turn(self) -> AbstractContextManager[object]:
        """See :meth:`splitwiser.engine.worker.Lane.turn`."""
        self.before_step()
        return nullcontext()

    def leave(self) -> None:
        """See :meth:`splitwiser.engine.worker.Lane.leave`."""
        self._part.leave()

    def before_step(self) -> int:
        """Take up work; returns the number of threads set."""
        count = self._share.threads(take_threads(self._part, self._levels, self._cores))
        if count != self._set:
            torch.set_num_threads(count)
            self._set = count
        return count
