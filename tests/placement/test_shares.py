"""The board that workers share, and the policy that divides a device between the phases."""

from collections.abc import Callable

import pytest
import torch

from splitwiser.placement.shares import WINDOW, AutoLevel, Board, WorkerShare

UNITS = (16, 32, 64, 96)


def settle(auto: AutoLevel, gap_of: Callable[[int], float]) -> list[int]:
    """The levels that ``auto`` goes through while a gap takes ``gap_of(units)`` seconds."""
    levels = []
    for _ in range(20):
        for _ in range(WINDOW):
            auto.observe(gap_of(UNITS[auto.level]))
        levels.append(auto.level)
    return levels


def test_decode_that_misses_its_target_gets_more() -> None:
    levels = settle(AutoLevel(UNITS, 0, 0.010), lambda units: 0.6 / units)
    assert levels[:3] == [1, 2, 2]  # 0.6 / 64 is the first below the target
    assert set(levels[2:]) == {2}


def test_decode_that_needs_all_keeps_the_most() -> None:
    assert settle(AutoLevel(UNITS, 2, 0.001), lambda units: 1 / units)[-1] == len(UNITS) - 1


def test_decode_that_units_do_not_help_leaves_them_to_prefill() -> None:
    assert settle(AutoLevel(UNITS, 3, 0.050), lambda _: 0.010)[-1] == 0  # bound by memory, far below the target


def test_units_are_given_away_only_if_the_target_is_kept() -> None:
    # at 64 units a gap is 8 ms; at 32 it could be 16, more than the target of 12
    assert settle(AutoLevel(UNITS, 2, 0.012), lambda units: 0.512 / units) == [2] * 20


def test_a_single_slow_gap_moves_nothing() -> None:
    auto = AutoLevel(UNITS, 1, 0.010)
    for number in range(12):
        auto.observe(0.5 if number == 5 else 0.009)
    assert auto.level == 1


@pytest.mark.parametrize(("missed", "level"), [(2, 1), (3, 2)])
def test_decode_gets_more_when_more_than_half_of_its_gaps_miss(missed: int, level: int) -> None:
    auto = AutoLevel(UNITS, 1, 0.010)
    for gap_s in [0.012] * missed + [0.008] * (WINDOW - missed):
        auto.observe(gap_s)
    assert auto.level == level


# with 64 units for 96, a gap may take half as long again
@pytest.mark.parametrize(("worst", "level"), [(0.95, 3), (0.89, 2)])
def test_units_are_given_away_only_with_a_margin(worst: float, level: int) -> None:
    auto = AutoLevel(UNITS, 3, 0.010)
    for _ in range(WINDOW):
        auto.observe(worst * 0.010 / 1.5)
    assert auto.level == level


def board(busy: list[bool]) -> Board:
    made = Board.over(torch.zeros(Board.nbytes(len(busy)), dtype=torch.uint8))
    for worker, has_work in enumerate(busy):
        made.set_busy(worker, has_work)
    return made


@pytest.mark.parametrize(("lend", "lent"), [(True, [False, False, True]), (False, [False] * 3)])
def test_workers_without_work_lend_their_part(lend: bool, lent: list[bool]) -> None:
    assert WorkerShare(board([True, False, False]), 1, lend).claim() == (0, lent)


def test_a_part_that_is_left_can_be_lent() -> None:
    words = board([True, True])
    WorkerShare(words, 0, True).release()
    assert WorkerShare(words, 1, True).claim() == (0, [True, False])


@pytest.mark.parametrize(("prefill_works", "level"), [(True, 2), (False, 1)])
def test_only_gaps_beside_prefill_count(prefill_works: bool, level: int) -> None:
    words = board([prefill_works, True])
    words.level = 1
    decode = WorkerShare(words, 1, True, AutoLevel(UNITS, 1, 0.010), prefill=[0])
    for _ in range(WINDOW):
        decode.observe(0.020)
    assert words.level == level


def test_each_word_keeps_to_its_worker() -> None:
    memory = torch.zeros(Board.nbytes(3), dtype=torch.uint8)
    board, other = Board.over(memory), Board.over(memory)
    board.add_heartbeat(1)
    board.add_heartbeat(1)
    board.add_heartbeat(2)
    board.set_busy(0, True)
    board.level = 4
    assert other.heartbeats() == [0, 2, 1]
    assert other.busy() == [True, False, False]
    assert other.level == 4
