"""The words that workers share."""

import torch

from splitwiser.placement.board import Board


def test_each_word_keeps_to_its_worker() -> None:
    memory = torch.zeros(Board.nbytes(3), dtype=torch.uint8)
    board, other = Board.over(memory), Board.over(memory)
    board.beat(1)
    board.beat(1)
    board.beat(2)
    board.set_busy(0, True)
    board.level = 4
    assert other.beats() == [0, 2, 1]
    assert other.busy() == [True, False, False]
    assert other.level == 4
