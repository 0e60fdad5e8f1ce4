"""Shares as threads and cores, and the lending of threads."""

import pytest
import torch

from splitwiser.board import Board
from splitwiser.cores import Threads, plan_cores, plan_levels, plan_threads
from splitwiser.layout import WorkerSpec, parse_layout
from splitwiser.shares import Part


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


def lent(board: Board, lending: bool = True) -> list[Threads]:
    return [Threads(Part(board, number, lending), [[2, 1, 1]], 4) for number in range(3)]


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
        third.leave()
        assert first.before_step() == 3
    finally:
        torch.set_num_threads(before)


def test_without_lending_each_has_its_own(board: Board) -> None:
    before = torch.get_num_threads()
    try:
        assert [worker.before_step() for worker in lent(board, lending=False)] == [2, 1, 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("layout", "cores", "levels"),
    [
        ("[{role: prefill}, {role: decode}]", 2, [[1, 1]]),
        ("[{role: prefill}, {role: decode}]", 4, [[3, 1], [2, 2], [1, 3]]),
        ("[{role: prefill, count: 2}, {role: decode}]", 5, [[2, 2, 1], [1, 1, 2], [1, 1, 3]]),
        ("[{role: prefill, count: 2}, {role: decode, count: 2}]", 2, [[1, 1, 1, 1]]),
    ],
)
def test_auto_cuts_the_cores_between_the_phases(layout: str, cores: int, levels: list[list[int]]) -> None:
    assert plan_levels(parse_layout(layout).workers, cores, "auto") == levels


def test_undivided_cores_are_all_for_everyone() -> None:
    assert plan_levels(workers(50, 50), 4, "none") == [[4, 4]]


def test_the_level_says_which_threads_hold(board: Board) -> None:
    before = torch.get_num_threads()
    try:
        for worker in (0, 1, 2):
            board.set_busy(worker, True)
        first = Threads(Part(board, 0, True), [[2, 1, 1], [1, 2, 1]], 4)
        assert first.before_step() == 2
        board.level = 1
        assert first.before_step() == 1
    finally:
        torch.set_num_threads(before)


def test_what_is_lent_makes_no_more_threads_than_cores(board: Board) -> None:
    before = torch.get_num_threads()
    try:
        assert Threads(Part(board, 0, True), [[4, 4, 4]], 4).before_step() == 4
    finally:
        torch.set_num_threads(before)
