"""Shares as threads and cores, and the lending of threads."""

import pytest
import torch

from splitwiser.cores import Board, LentThreads, plan_cores, plan_threads
from splitwiser.layout import WorkerSpec


def workers(*shares: float) -> list[WorkerSpec]:
    return [WorkerSpec(f"mixed-{number}", "mixed", share) for number, share in enumerate(shares)]


@pytest.mark.parametrize(
    ("shares", "cores", "threads"),
    [
        ((50, 50), 2, [1, 1]),
        ((75, 25), 8, [6, 2]),
        ((25, 25, 25, 25), 2, [1, 1, 1, 1]),
        ((100,), 3, [3]),
        ((5, 95), 4, [1, 4]),
    ],
)
def test_a_share_becomes_threads(shares: tuple[float, ...], cores: int, threads: list[int]) -> None:
    assert plan_threads(workers(*shares), cores) == threads


def test_cores_are_divided_while_there_are_enough() -> None:
    assert plan_cores(workers(50, 25, 25), [2, 3, 6, 7]) == [{2, 3}, {6}, {7}]


def test_too_few_cores_are_shared_by_all() -> None:
    assert plan_cores(workers(30, 30, 40), [0, 1]) == [{0, 1}] * 3


@pytest.fixture
def board() -> Board:
    return Board.over(torch.zeros(Board.nbytes(3), dtype=torch.uint8))


def lent(board: Board, lending: bool = True) -> list[LentThreads]:
    return [LentThreads(board, number, [2, 1, 1], 4, lending) for number in range(3)]


def test_idle_workers_lend_their_threads_and_get_them_back(board: Board) -> None:
    before = torch.get_num_threads()
    try:
        first, second, third = lent(board)
        assert first.before_step() == 4  # nobody else has work
        assert torch.get_num_threads() == 4
        assert second.before_step() == 2  # its own and the third's
        assert first.before_step() == 3
        assert third.before_step() == 1
        assert first.before_step() == 2
        third.idle()
        assert first.before_step() == 3
    finally:
        torch.set_num_threads(before)


def test_without_lending_each_has_its_own(board: Board) -> None:
    before = torch.get_num_threads()
    try:
        assert [worker.before_step() for worker in lent(board, lending=False)] == [2, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_beats_are_counted_by_worker(board: Board) -> None:
    board.beat(1)
    board.beat(1)
    board.beat(2)
    assert board.beats() == [0, 2, 1]
    assert board.busy() == [False] * 3
