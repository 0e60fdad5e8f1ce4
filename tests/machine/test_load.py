"""What the processors did: read from trees of files as the kernel lays them out, judged on given numbers, and for real."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitwiser.machine.load import COLUMNS, Load, MachineLoad, Reading, busy_note, load_between, measure_load
from tests.support.assertions import assert_says

TICKS_S = os.sysconf("SC_CLK_TCK")
QUIET = Load(seconds=10.0, load_average=0.5, cores=2.0, own_cores=1.9, others_cores=0.05, cpu_pressure=0.1)
BUSY = replace(QUIET, own_cores=0.4, others_cores=1.6)


def write_proc(
    proc: Path,
    *,
    idle_s: dict[int, float],
    busy_s: dict[int, float],
    processes: dict[int, tuple[int, float, float]],
    waited_us: int | None = 0,
) -> Path:
    """A ``/proc``: seconds of each processor, and of each process (its parent, its own seconds, those of children that it
    has waited for)."""
    rows = []
    for number, idle in idle_s.items():
        user, waiting = busy_s[number] * TICKS_S, idle * TICKS_S / 4
        # user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice
        rows.append(
            f"cpu{number} {user / 2:.0f} 0 {user / 4:.0f} {3 * waiting:.0f} {waiting:.0f} 0 0 {user / 4:.0f} 99999 0"
        )
    (proc / "pressure").mkdir(parents=True, exist_ok=True)
    (proc / "stat").write_text("cpu 1 2 3 4\n" + "\n".join(rows) + "\nintr 5\nctxt 6\n")
    (proc / "loadavg").write_text("2.50 1.00 0.50 3/90 1234\n")
    if waited_us is not None:
        some = f"some avg10=1.00 avg60=0.00 avg300=0.00 total={waited_us}"
        (proc / "pressure" / "cpu").write_text(f"{some}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n")
    for pid, (parent, own, waited) in processes.items():
        (proc / str(pid)).mkdir(exist_ok=True)
        times = f"{own / 2 * TICKS_S:.0f} {own / 2 * TICKS_S:.0f} {waited * TICKS_S:.0f} 0"
        (proc / str(pid) / "stat").write_text(
            f"{pid} (a (b) 7 8) S {parent} 0 0 0 0 0 0 0 0 0 {times} 20 0 1 0 5 6 7\n"
        )
    return proc


def read(proc: Path, at_s: float, **settings: Any) -> Reading:
    groups = proc / "cgroup"
    return Reading.take(proc, groups, **{"pid": 10, "processors": {0, 1}, "at_s": at_s, **settings})


@pytest.fixture
def began(tmp_path: Path) -> Reading:
    """A process 10 with a child 11 and a grandchild 12, beside a stranger 13, at second 100."""
    write_proc(
        tmp_path,
        idle_s={0: 50, 1: 60, 2: 70},
        busy_s={0: 50, 1: 40, 2: 30},
        processes={10: (1, 3, 1), 11: (10, 2, 0), 12: (11, 1, 0), 13: (1, 40, 0)},
    )
    return read(tmp_path, 100)


def test_what_others_used_is_what_was_neither_idle_nor_own(tmp_path: Path, began: Reading) -> None:
    write_proc(
        tmp_path,
        idle_s={0: 52, 1: 61, 2: 70},
        busy_s={0: 58, 1: 49, 2: 40},
        # the child has ended, and its parent has waited for it: 2 + 1 seconds; the grandchild went to init
        processes={10: (1, 6, 6), 11: (1, 0, 0), 12: (1, 9, 0), 13: (1, 49, 0)},
        waited_us=2_500_000,
    )
    load = load_between(began, read(tmp_path, 110))
    assert (load.seconds, load.cores, load.load_average) == (10, 2, 2.5)
    assert load.own_cores == pytest.approx((12 - 7) / 10)
    assert load.others_cores == pytest.approx(2 - 0.3 - 0.5)
    assert load.cpu_pressure == pytest.approx(0.25)


def test_workers_that_are_alive_are_own(tmp_path: Path, began: Reading) -> None:
    write_proc(
        tmp_path,
        idle_s={0: 50, 1: 60},
        busy_s={0: 60, 1: 50},
        processes={10: (1, 4, 1), 11: (10, 10, 0), 12: (11, 11, 0), 13: (1, 41, 0)},
    )
    load = load_between(began, read(tmp_path, 110))
    assert load.own_cores == pytest.approx(1.9)
    assert load.others_cores == pytest.approx(0.1)


def test_without_pressure_none_is_told(tmp_path: Path, began: Reading) -> None:
    (tmp_path / "pressure" / "cpu").unlink()
    assert load_between(began, read(tmp_path, 110)).cpu_pressure is None


@pytest.mark.parametrize("idle", [50, 55], ids=["numbers that stand still", "numbers of other processors"])
def test_what_the_system_does_not_show_is_not_told(idle: int, tmp_path: Path, began: Reading) -> None:
    if idle == 55:
        write_proc(tmp_path, idle_s={0: idle}, busy_s={0: 55}, processes={10: (1, 3, 1)})
    load = load_between(began, read(tmp_path, 110))
    assert load.others_cores is None
    assert MachineLoad(QUIET, load).busy is None


def limited(proc: Path, quota: float, used_us: int) -> None:
    """Put the process into a control group (v2) with a quota."""
    (proc / "self").mkdir(exist_ok=True)
    (proc / "self" / "cgroup").write_text("0::/app\n")
    (proc / "cgroup" / "app").mkdir(parents=True, exist_ok=True)
    (proc / "cgroup" / "app" / "cpu.max").write_text(f"{quota * 100000:.0f} 100000\n")
    (proc / "cgroup" / "app" / "cpu.stat").write_text(f"usage_usec {used_us}\nuser_usec 5\n")


@pytest.mark.parametrize(
    ("idle", "used", "others"),
    [
        (0, 1.0, 0.0),  # a neighbour has the other processor, which the quota does not give to this process
        (0, 0.6, 0.4),  # it took of this one's as well
        (1.0, 0.9, 0.3),  # another process of the same container, which takes of the quota (0.3 of the group's 1.2)
    ],
)
def test_a_quota_leaves_the_rest_to_others(idle: float, used: float, others: float, tmp_path: Path) -> None:
    write_proc(tmp_path, idle_s={0: 0, 1: 0}, busy_s={0: 0, 1: 0}, processes={10: (1, 0, 0)})
    limited(tmp_path, 1.0, 0)
    began = read(tmp_path, 0)
    write_proc(
        tmp_path, idle_s={0: 0, 1: idle * 10}, busy_s={0: 10, 1: 10 - idle * 10}, processes={10: (1, used * 10, 0)}
    )
    limited(tmp_path, 1.0, 12_000_000 if idle else 0)
    load = load_between(began, read(tmp_path, 10))
    assert load.cores == 1
    assert load.others_cores == pytest.approx(others)


@pytest.mark.parametrize(
    ("changes", "busy"),
    [
        ({}, False),
        ({"own_cores": 0.4, "others_cores": 1.6}, True),
        ({"own_cores": 1.0, "others_cores": 1.0}, True),
        ({"own_cores": 1.8, "others_cores": 0.19}, False),  # others: less than a tenth
        ({"own_cores": 0.5, "others_cores": 1.2}, False),  # 0.3 of 2 cores were idle
        ({"own_cores": 2.0, "others_cores": 8.0, "cores": 64.0}, False),
        ({"own_cores": 20.0, "others_cores": 40.0, "cores": 64.0}, True),
        # too short to tell by itself, and nobody did much before
        ({"own_cores": 0.4, "others_cores": 1.6, "seconds": 0.1}, False),
        ({"others_cores": None}, None),
    ],
)
def test_the_rule(changes: dict[str, float | None], busy: bool | None) -> None:
    before = replace(QUIET, own_cores=0.0)
    assert MachineLoad(before, replace(QUIET, **changes)).busy is busy  # type: ignore[arg-type]


@pytest.mark.parametrize(("before", "busy"), [(None, None), (0.05, False), (1.0, True)])
def test_of_a_short_run_what_others_did_before_has_to_say_the_same(before: float | None, busy: bool | None) -> None:
    seen = replace(QUIET, own_cores=0.0, others_cores=before)
    assert MachineLoad(seen, replace(BUSY, seconds=0.1)).busy is busy
    assert MachineLoad(seen, replace(QUIET, seconds=0.1)).busy is (None if before is None else False)


@pytest.mark.parametrize(("others", "cores", "crowded"), [(0.3, 2.0, True), (0.1, 2.0, False), (0.3, 64.0, False)])
def test_a_machine_is_crowded_for_who_wants_all_cores(others: float, cores: float, crowded: bool) -> None:
    assert replace(QUIET, own_cores=0.0, others_cores=others, cores=cores).crowded is crowded


def test_the_note_names_what_others_used() -> None:
    note = MachineLoad(QUIET, BUSY).record["note"]
    assert note == "other processes used 1.6 of 2 cores while this ran; figures are not this machine's own"
    assert MachineLoad(QUIET, QUIET).record["note"] is None


def test_the_note_comes_from_a_row_as_a_csv_gives_it_back() -> None:
    row = {name: str(value) for name, value in MachineLoad(QUIET, BUSY).columns.items()}
    assert_says(busy_note(row) or "", "1.6 of 2 cores")
    assert busy_note({**row, "machine_busy": ""}) is None
    assert busy_note({"output_throughput": 5}) is None  # of a run before there was such a column


def test_the_columns_of_a_run() -> None:
    assert MachineLoad(QUIET, BUSY).columns == {
        "load_before": 0.5, "cores": 2.0, "own_cores": 0.4, "others_cores": 1.6, "cpu_pressure": 0.1, "machine_busy": True,
    }  # fmt: skip
    assert MachineLoad().columns == dict.fromkeys(COLUMNS)


# for real


@pytest.fixture
def two_processors() -> set[int]:
    return set(sorted(os.sched_getaffinity(0))[:2])


@pytest.fixture
def strangers(two_processors: set[int]) -> Iterator[list[int]]:
    """Processes that spin on two processors and are no children of this one: who started them has ended."""
    spin = f"import os, time\nos.sched_setaffinity(0, {two_processors})\nwhile time.process_time() < 60: pass"
    start = (
        f"import subprocess, sys\nfor _ in range(4): print(subprocess.Popen([sys.executable, '-c', {spin!r}], "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    made = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True, timeout=60)
    pids = list(map(int, made.stdout.split()))
    yield pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_machine_that_others_load_is_busy(strangers: list[int], two_processors: set[int]) -> None:
    assert strangers
    time.sleep(0.5)  # until they have started
    began = Reading.take(processors=two_processors)
    time.sleep(1.0)
    load = load_between(began, Reading.take(processors=two_processors))
    assert MachineLoad(None, load).busy
    assert load.others_cores is not None
    assert load.others_cores > 0.5 * len(two_processors)
    assert_says(MachineLoad(None, load).record["note"], "other processes used", f"of {len(two_processors)} cores")


def test_what_a_child_uses_is_own() -> None:
    began = Reading.take()
    child = subprocess.Popen(
        [sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        alive = Reading.take().own_s - began.own_s
    finally:
        child.kill()
        child.communicate()
    assert alive >= 0.25
    assert Reading.take().own_s - began.own_s >= alive  # it has been waited for


def test_a_look_is_of_now() -> None:
    load = measure_load()
    assert load.cores <= len(os.sched_getaffinity(0))
    assert load.load_average is not None
