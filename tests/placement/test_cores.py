"""Shares as threads and cores, and the lending of threads."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from splitwiser import LLM, SamplingParams
from splitwiser.engine.messages import WorkerSpec
from splitwiser.machine.fair_share import FairShare, OwnThreads
from splitwiser.placement.cores import (
    SECOND_LANE_NICE,
    CpuShare,
    Pace,
    SecondLane,
    plan_cores,
    plan_levels,
    plan_threads,
)
from splitwiser.placement.layout import parse_layout
from splitwiser.placement.shares import Board, WorkerShare


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


def lent(board: Board, lending: bool = True) -> list[CpuShare]:
    return [CpuShare(WorkerShare(board, number, lending), [[2, 1, 1]], 4) for number in range(3)]


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
        third.release()
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
        first = CpuShare(WorkerShare(board, 0, True), [[2, 1, 1], [1, 2, 1]], 4)
        assert first.before_step() == 2
        board.level = 1
        assert first.before_step() == 1
    finally:
        torch.set_num_threads(before)


def test_what_is_lent_makes_no_more_threads_than_cores(board: Board) -> None:
    before = torch.get_num_threads()
    try:
        assert CpuShare(WorkerShare(board, 0, True), [[4, 4, 4]], 4).before_step() == 4
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def all_to_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FairShare, "threads", lambda _, wanted: wanted)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("share", [1, 2])
def test_steps_in_the_callers_thread_use_what_it_has_processors_for(
    share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FairShare, "threads", lambda _, wanted: min(wanted, share))
    threads = OwnThreads()
    threads.before_step()
    assert torch.get_num_threads() == share
    threads.before_step()
    assert torch.get_num_threads() == share
    threads.release()
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_worker_uses_no_more_than_it_has_processors_for(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FairShare, "threads", lambda _, wanted: wanted - 1)
    assert lent(board)[0].before_step() == torch.get_num_threads() == 3


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("mode", ["sequential", "generate"])
def test_a_run_leaves_the_callers_number_of_threads(
    mode: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def one(_: FairShare, wanted: int) -> int:
        used.append(wanted)
        return 1

    monkeypatch.setattr(FairShare, "threads", one)
    with LLM(tiny("llama"), mode=mode) as llm:
        del used[:]
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4))
    assert len(used) >= 4
    assert set(used) == {2}
    assert torch.get_num_threads() == 2


class Lane:
    """A second lane with a number of steps to run, that shows what holds during each."""

    def __init__(self, board: Board, steps: int, error: Exception | None = None) -> None:
        self.board, self.left, self.error = board, steps, error
        self.seen: list[tuple[bool, int, int]] = []
        self.ended = threading.Event()
        self.failed: list[BaseException] = []
        self.lane = SecondLane(self.step, board, 1, self.fail)

    def step(self) -> bool:
        niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.seen.append((self.board.backlog, niceness, torch.get_num_threads()))
        if self.error:
            raise self.error
        self.left -= 1
        return self.left > 0

    def fail(self, error: BaseException) -> None:
        self.failed.append(error)
        self.ended.set()

    def wait_until_closed(self) -> None:
        deadline = time.monotonic() + 10
        while (self.left or self.board.backlog) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not self.board.backlog


def test_a_second_lane_runs_once_opened_until_there_is_no_step(board: Board) -> None:
    lane = Lane(board, 3)
    assert not board.backlog
    lane.lane.open()
    lane.wait_until_closed()
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert lane.seen == [(True, max(own, SECOND_LANE_NICE), 1)] * 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_a_second_lane_that_fails_says_so(board: Board) -> None:
    lane = Lane(board, 1, ValueError("no"))
    lane.lane.open()
    assert lane.ended.wait(10)
    assert [str(error) for error in lane.failed] == ["no"]


@pytest.mark.usefixtures("two_threads")
def test_nothing_else_is_lent_beside_a_second_lane(board: Board) -> None:
    board.backlog = True
    assert [worker.before_step() for worker in lent(board)] == [2, 1, 1]


def test_decode_keeps_its_pace_while_there_is_a_backlog(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    waits: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    monkeypatch.setattr("time.sleep", waits.append)
    pace = Pace(board, 0.06)
    pace.wait()
    pace.wait()
    assert waits == []
    board.backlog = True
    now_s += 0.02
    pace.wait()  # the step before began 20 ms ago
    now_s += 0.04
    now_s += 0.05
    pace.wait()
    now_s += 0.5  # a step that took longer than the pace
    pace.wait()
    assert waits == pytest.approx([0.04, 0.01])
