"""A worker's share of a CPU: how many threads its steps use, and lending them while a worker has nothing to do."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from splitwiser.layout import WorkerSpec


def plan_threads(workers: Sequence[WorkerSpec], cores: int) -> list[int]:
    """Threads of each worker: its share of ``cores``, rounded, but at least one."""
    return [max(1, round(worker.share * cores / 100)) for worker in workers]


def plan_cores(workers: Sequence[WorkerSpec], cores: Sequence[int]) -> list[set[int]]:
    """The cores of each worker where none are lent: as many as its threads, no core in two workers' hands while there are
    enough; if there are not, every worker may use all."""
    threads = plan_threads(workers, len(cores))
    if sum(threads) > len(cores):
        return [set(cores) for _ in workers]
    ends = list(accumulate(threads))
    return [set(cores[end - count : end]) for count, end in zip(threads, ends, strict=True)]


def lent_threads(worker: int, threads: Sequence[int], busy: Sequence[bool], cores: int) -> int:
    """Threads of ``worker``'s next step where cores are lent: its own and those of the workers without work."""
    lent = sum(count for count, has_work in zip(threads, busy, strict=True) if not has_work)
    return min(threads[worker] + lent, max(cores, threads[worker]))


class Board:
    """A word a worker in memory that all processes of a run share: whether it has work, and a count that shows it lives.

    Each worker writes its own words only, so no lock is needed. ``words`` is int64 of shape (workers, 2).
    """

    def __init__(self, words: Tensor) -> None:
        self._words = words

    @staticmethod
    def nbytes(workers: int) -> int:
        """Bytes that a board for ``workers`` workers takes."""
        return workers * 2 * 8

    @classmethod
    def over(cls, memory: Tensor) -> "Board":
        """The board that lies in ``memory`` (uint8)."""
        return cls(memory.view(torch.int64).view(-1, 2))

    def set_busy(self, worker: int, busy: bool) -> None:
        """Note whether ``worker`` has work."""
        self._words[worker, 0] = int(busy)

    def busy(self) -> list[bool]:
        """Which workers have work."""
        return [bool(word) for word in self._words[:, 0].tolist()]

    def beat(self, worker: int) -> None:
        """Show that ``worker`` lives."""
        self._words[worker, 1] += 1

    def beats(self) -> list[int]:
        """How often each worker has shown that it lives."""
        beats: list[int] = self._words[:, 1].tolist()
        return beats


class LentThreads:
    """Sets before each step how many threads it uses: the worker's own and, if ``lending``, those of the workers that have
    no work at that moment. They get theirs back at this worker's next step."""

    def __init__(self, board: Board, worker: int, threads: Sequence[int], cores: int, lending: bool) -> None:
        self._board = board
        self._worker = worker
        self._threads = threads
        self._cores = cores
        self._lending = lending
        self._set = 0

    def before_step(self) -> int:
        """Take up work; returns the number of threads set."""
        self._board.set_busy(self._worker, True)
        count = self._threads[self._worker]
        if self._lending:
            count = lent_threads(self._worker, self._threads, self._board.busy(), self._cores)
        if count != self._set:
            torch.set_num_threads(count)
            self._set = count
        return count

    def idle(self) -> None:
        """Lend this worker's threads."""
        self._board.set_busy(self._worker, False)
