"""Leases on blocks of a pool that prefill and decode engines share: who owns a block, between its handoff and its return.

Every block has one owner, the engine whose block objects carry its number. Prefill leases the blocks of a finished prompt
to a decode worker. Decode takes them over by an exchange of numbers: its block objects get the numbers of the full blocks,
and it returns the numbers of as many empty ones, which prefill's block objects get. So nothing is copied, and both engines
have as many blocks as before. A lease ends once: by the exchange, because decode does not want the blocks, or because it
died.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Block(Protocol):
    """A block of vLLM's scheduler; only its number is read and changed."""

    block_id: int


@dataclass(frozen=True)
class _Lease:
    blocks: Sequence[Block]
    to: str


class Lender:
    """Prefill's side: the leases that have not ended."""

    def __init__(self) -> None:
        self._open: dict[str, _Lease] = {}
        self._ended: set[str] = set()

    @property
    def open_leases(self) -> int:
        """Number of leases that have not ended."""
        return len(self._open)

    def lend(self, lease: str, blocks: Sequence[Block], to: str) -> None:
        """Lease ``blocks`` to the worker ``to``; ``lease`` is the engine's own id of their request."""
        self._open[lease] = _Lease(blocks, to)

    def end(self, lease: str, numbers: Sequence[int]) -> None:
        """End ``lease``: its blocks get ``numbers``, or keep their own if there are none.

        Raises KeyError if there is no such lease, ValueError if there are as many numbers as there should not be.
        """
        blocks = self._open[lease].blocks
        if numbers:
            for block, number in zip(blocks, numbers, strict=True):
                block.block_id = number
        del self._open[lease]
        self._ended.add(lease)

    def reclaim(self, worker: str) -> None:
        """End all leases to ``worker``, which has died; the blocks keep their numbers."""
        for lease in [name for name, each in self._open.items() if each.to == worker]:
            self.end(lease, ())

    def take_ended(self) -> set[str]:
        """Return the leases that have ended since the last call; the engine may free their blocks."""
        ended, self._ended = self._ended, set()
        return ended


def exchange(own: Sequence[Block], offered: Sequence[int]) -> tuple[int, ...]:
    """Give the first blocks of ``own``, which are empty, the numbers ``offered``; returns the numbers that they had.

    Raises ValueError, and changes nothing, if there are fewer blocks than numbers.
    """
    if len(own) < len(offered):
        raise ValueError(f"{len(offered)} blocks are offered for {len(own)}")
    given = tuple(block.block_id for block in own[: len(offered)])
    for block, number in zip(own, offered, strict=False):
        block.block_id = number
    return given
