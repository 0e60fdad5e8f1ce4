"""Threads are as many as there are processors for, by what the kernel says that they ran and waited."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from splitwiser.machine.fair_share import LOOK_S, RISE_S, FairShare

MS = 1_000_000  # ns


class Machine:
    """Threads whose times a test sets, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now_s = 0.0
        self.times: dict[str, tuple[int, int]] = {}

    def clock(self) -> float:
        return self.now_s

    def pass_time(self, seconds: float, ran_ms: int, waited_ms: int, task: str = "7") -> None:
        self.now_s += seconds
        ran, waited = self.times.get(task, (0, 0))
        self.times[task] = ran + ran_ms * MS, waited + waited_ms * MS
        (self.folder / task).mkdir(exist_ok=True)
        (self.folder / task / "schedstat").write_text(f"{self.times[task][0]} {self.times[task][1]} 5\n")


@pytest.fixture(autouse=True)
def no_number_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("ran_ms", "waited_ms", "wanted", "threads"),
    [(100, 0, 2, 2), (100, 10, 2, 2), (20, 80, 2, 1), (10, 90, 16, 2), (50, 50, 16, 8), (1, 99, 16, 1), (20, 80, 1, 1)],
)
def test_as_many_as_the_share_comes_to(
    ran_ms: int, waited_ms: int, wanted: int, threads: int, machine: Machine
) -> None:
    share = FairShare(tasks=machine.folder, clock=machine.clock)
    machine.pass_time(1, ran_ms, waited_ms)
    assert share.threads(wanted) == threads


def test_all_threads_count(machine: Machine) -> None:
    share = FairShare(tasks=machine.folder, clock=machine.clock)
    machine.pass_time(0, 100, 0, "7")
    machine.pass_time(0, 20, 80, "8")
    assert share.threads(10) == 6


def test_looks_only_now_and_then(machine: Machine) -> None:
    share = FairShare(tasks=machine.folder, clock=machine.clock)
    machine.pass_time(1, 100, 0)
    assert share.threads(2) == 2
    machine.pass_time(LOOK_S / 2, 0, 100)
    assert share.threads(2) == 2
    machine.pass_time(LOOK_S / 2, 0, 0)
    assert share.threads(2) == 1


def test_a_greater_share_is_believed_after_a_while(machine: Machine) -> None:
    share = FairShare(tasks=machine.folder, clock=machine.clock)
    machine.pass_time(1, 10, 90)
    assert share.threads(2) == 1
    machine.pass_time(RISE_S * 0.6, 100, 0)
    assert share.threads(2) == 1
    machine.pass_time(RISE_S * 0.6, 100, 0)
    assert share.threads(2) == 2


def test_the_users_own_number_holds(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    share = FairShare(tasks=machine.folder, clock=machine.clock)
    machine.pass_time(1, 10, 90)
    assert share.threads(2) == 2


def test_steps_on_a_gpu_leave_the_threads_alone(machine: Machine) -> None:
    share = FairShare(on_cpu=False, tasks=machine.folder, clock=machine.clock)
    machine.pass_time(1, 10, 90)
    assert share.threads(2) == 2


def test_a_kernel_that_does_not_tell_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    assert FairShare(tasks=tmp_path).threads(2) == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not tell how long threads wait")
def test_beside_processes_that_spin_threads_become_fewer() -> None:
    code = """
import time
from splitwiser.machine.fair_share import FairShare
share, until = FairShare(), time.monotonic() + 20
share.threads(8)
while share.threads(8) > 6 and time.monotonic() < until: pass
print(share.threads(8))
"""
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    cpu = str(min(os.sched_getaffinity(0)))  # all on one processor, so that few processes are enough
    pinned = f"import os; os.sched_setaffinity(0, [{cpu}])\n"
    spinning = [subprocess.Popen([sys.executable, "-c", f"{pinned}while True: pass"]) for _ in range(3)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", pinned + code], capture_output=True, text=True, check=True, env=own
        )
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    assert int(done.stdout) <= 6
