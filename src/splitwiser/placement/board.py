"""What the workers of a run tell each other outside of messages: who has work, which split holds, who lives."""

import torch
from torch import Tensor


class Board:
    """A few words in memory that all workers of a run can reach: for each worker whether it has work and a count that
    shows it lives, and one level, the number of the split that holds (see :mod:`splitwiser.placement.shares`).

    Each word has one writer, so no lock is needed. ``words`` is int64 of shape (workers + 1, 2).
    """

    def __init__(self, words: Tensor) -> None:
        self._words = words

    @staticmethod
    def nbytes(workers: int) -> int:
        """Bytes that a board for ``workers`` workers takes."""
        return (workers + 1) * 2 * 8

    @classmethod
    def over(cls, memory: Tensor) -> "Board":
        """The board that lies in ``memory`` (uint8)."""
        return cls(memory.view(torch.int64).view(-1, 2))

    @property
    def level(self) -> int:
        """Which split holds."""
        return int(self._words[-1, 0])

    @level.setter
    def level(self, level: int) -> None:
        self._words[-1, 0] = level

    def set_busy(self, worker: int, busy: bool) -> None:
        """Note whether ``worker`` has work."""
        self._words[worker, 0] = int(busy)

    def busy(self) -> list[bool]:
        """Which workers have work."""
        return [bool(word) for word in self._words[:-1, 0].tolist()]

    def beat(self, worker: int) -> None:
        """Show that ``worker`` lives."""
        self._words[worker, 1] += 1

    def beats(self) -> list[int]:
        """How often each worker has shown that it lives."""
        beats: list[int] = self._words[:-1, 1].tolist()
        return beats
