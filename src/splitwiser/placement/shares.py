"""How the workers divide a device's compute while they all have work, and who may use the rest while some have none.

One policy; what carries it out is threads on a CPU (:mod:`splitwiser.placement.cores`) and streams in green contexts on a
GPU (:mod:`splitwiser.placement.green`). A *split* says how many units (cores, multiprocessors) each phase has; the splits
are numbered by *level*, from the least for decode to the most.
"""

from collections import deque
from collections.abc import Sequence

from splitwiser.placement.board import Board

WINDOW = 4  # gaps between tokens that a change of level is judged by
COMFORT = 0.9  # decode gives units away only if it then keeps this part of its target, as far as can be told


class AutoLevel:
    """Gives decode the units that it needs to keep its ITL target beside prefill, and prefill the rest.

    It goes by the gaps between tokens as this run measures them: after :data:`WINDOW` gaps at a level, decode goes up one
    if more than half missed the target, and down one if their worst would still keep it with the units there, should
    decode slow down in proportion to them, which is the most that it can.
    """

    def __init__(self, decode_units: Sequence[int], level: int, itl_target_s: float) -> None:
        self.level = level
        self._units = decode_units
        self._target_s = itl_target_s
        self._gaps: deque[float] = deque(maxlen=WINDOW)

    def observe(self, gap_s: float) -> None:
        """Take in a gap between two tokens that decode made while prefill was at work."""
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


class Part:
    """One worker's part of the device, from step to step: what holds at the moment is read off the board."""

    def __init__(
        self, board: Board, worker: int, lend: bool, auto: AutoLevel | None = None, prefill: Sequence[int] = ()
    ) -> None:
        self.worker = worker
        self._board = board
        self._lend = lend
        self._auto = auto
        self._prefill = prefill

    def take(self) -> tuple[int, list[bool]]:
        """Take up work. Returns the level that holds and, by worker, whose part this worker may use beside its own."""
        self._board.set_busy(self.worker, True)
        busy = self._board.busy()
        return self._board.level, [self._lend and not has_work for has_work in busy]

    def leave(self) -> None:
        """Have no work, and lend this part."""
        self._board.set_busy(self.worker, False)

    def observe(self, gap_s: float) -> None:
        """Hear of a gap between two tokens; only the one worker that has ``auto`` moves the level."""
        busy = self._board.busy()
        if self._auto is not None and any(busy[worker] for worker in self._prefill):
            self._auto.observe(gap_s)
            self._board.level = self._auto.level
