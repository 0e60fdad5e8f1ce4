"""Division of a device's compute between workers: the split while all have work, and lending of idle workers' shares.

The policy is the same everywhere; it is carried out by threads on a CPU (:mod:`splitwiser.placement.cores`) and by streams
in green contexts on a GPU (:mod:`splitwiser.placement.green`). A *split* gives the number of units (cores,
multiprocessors) of each phase; splits are numbered by *level*, from the fewest units for decode to the most.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 4  # gaps between tokens on which a change of level is decided
COMFORT = 0.9  # decode gives units away only if its predicted gap is then at most this part of its target


class Board:
    """Status words in memory that all workers of a run share: for each worker whether it has work and a heartbeat count,
    the level of the current split, and whether prefill has a backlog.

    Each word has one writer, so no lock is needed. ``words`` is int64 of shape (workers + 1, 2).
    """

    def __init__(self, words: Tensor) -> None:
        self._words = words

    @staticmethod
    def nbytes(workers: int) -> int:
        """Return the size in bytes of a board for ``workers`` workers."""
        return (workers + 1) * 2 * 8

    @classmethod
    def over(cls, memory: Tensor) -> "Board":
        """Return the board in ``memory``, uint8 of :meth:`nbytes` elements."""
        return cls(memory.view(torch.int64).view(-1, 2))

    @property
    def level(self) -> int:
        """Level of the current split."""
        return int(self._words[-1, 0])

    @level.setter
    def level(self, level: int) -> None:
        self._words[-1, 0] = level

    @property
    def backlog(self) -> bool:
        """Whether a backlog of prompts is prefilled in two lanes."""
        return bool(self._words[-1, 1])

    @backlog.setter
    def backlog(self, backlog: bool) -> None:
        self._words[-1, 1] = int(backlog)

    def set_busy(self, worker: int, busy: bool) -> None:
        """Set whether ``worker`` has work."""
        self._words[worker, 0] = int(busy)

    def busy(self) -> list[bool]:
        """Return for each worker whether it has work."""
        return [bool(word) for word in self._words[:-1, 0].tolist()]

    def add_heartbeat(self, worker: int) -> None:
        """Count a heartbeat of ``worker``."""
        self._words[worker, 1] += 1

    def heartbeats(self) -> list[int]:
        """Return the heartbeat count of each worker."""
        heartbeats: list[int] = self._words[:-1, 1].tolist()
        return heartbeats


class AutoLevel:
    """Gives decode the units that it needs to meet its ITL target beside prefill, and prefill the rest.

    It uses the gaps between tokens that this run measures: after :data:`WINDOW` gaps at a level, it goes up one level if
    more than half of them missed the target, and down one level if the longest would still meet it there, assuming the
    worst case that decode slows down in proportion to its units.
    """

    def __init__(self, decode_units: Sequence[int], level: int, itl_target_s: float) -> None:
        self.level = level
        self._units = decode_units
        self._target_s = itl_target_s
        self._gaps: deque[float] = deque(maxlen=WINDOW)

    def observe(self, gap_s: float) -> None:
        """Record a gap between two decode steps, in seconds, measured while prefill was busy; may change the level."""
        self._gaps.append(gap_s)
        if len(self._gaps) < WINDOW:
            return
        missed = sum(gap > self._target_s for gap in self._gaps)
        if missed > WINDOW / 2 and self.level < len(self._units) - 1:
            self._move(self.level + 1)
        elif self.level > 0:
            slower = self._units[self.level] / self._units[self.level - 1]
            if max(self._gaps) * slower <= COMFORT * self._target_s:
                self._move(self.level - 1)

    def _move(self, level: int) -> None:
        self.level = level
        self._gaps.clear()


class WorkerShare:
    """One worker's view of the division: reads the split and lent shares from the board, and writes its own state."""

    def __init__(
        self, board: Board, worker: int, lend: bool, auto: AutoLevel | None = None, prefill: Sequence[int] = ()
    ) -> None:
        self.worker = worker
        self._board = board
        self._lend = lend
        self._auto = auto
        self._prefill = prefill

    def claim(self) -> tuple[int, list[bool]]:
        """Mark this worker as busy. Returns the level and, for each worker, whether its share is lent to this one; none is
        while a second lane uses what others leave."""
        self._board.set_busy(self.worker, True)
        busy = self._board.busy()
        lends = self._lend and not self._board.backlog
        return self._board.level, [lends and not has_work for has_work in busy]

    def release(self) -> None:
        """Mark this worker as idle, and so lend its share."""
        self._board.set_busy(self.worker, False)

    def observe(self, gap_s: float) -> None:
        """Record a gap between two decode steps, in seconds; only the one worker that has ``auto`` changes the level."""
        busy = self._board.busy()
        if self._auto is not None and any(busy[worker] for worker in self._prefill):
            self._auto.observe(gap_s)
            self._board.level = self._auto.level
