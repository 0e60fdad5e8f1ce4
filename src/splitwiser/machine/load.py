"""Load of the machine during a measurement: how much processor time this process and others used.

The files are described in proc_stat(5), proc_pid_stat(5) and the kernel documentation, accounting/psi.
"""

import os
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from splitwiser.machine import cgroup

PROC = Path("/proc")
SHARE = 0.1  # of the cores: others use much if they use more than this, and little is idle if less than this is
LEAST_S = 0.5  # /proc counts in hundredths of a second, too coarse for shorter times
IDLE_MEASURE_S = 0.2  # how long the load of others is measured, while this process does nothing
COLUMNS = ("load_before", "cores", "own_cores", "others_cores", "cpu_pressure", "machine_busy")  # of throughput.csv

_IDLE = slice(3, 5)  # columns of /proc/stat: idle and iowait
_COUNTED = slice(0, 8)  # columns up to steal; the guests' time after it is included in the user's
_TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    """Mean use over ``seconds`` of the processors that this process may use.

    ``cores`` is the number of those processors, or a container's quota if that is less. ``own_cores`` is the processor
    time per second of this process and those that it started; ``others_cores`` that of everyone else, including time that
    a hypervisor gave to others, or None if the system does not report it. Under a quota it counts only what others used
    beyond the processors that the quota leaves free or, for processes in the same container, what they used of the quota.
    ``cpu_pressure`` is the part of the time in which some process, own ones included, waited for a processor; None if the
    kernel does not report it. ``load_average`` is that of the last minute at the start.
    """

    seconds: float
    load_average: float | None
    cores: float
    own_cores: float
    others_cores: float | None
    cpu_pressure: float | None

    @property
    def crowded(self) -> bool:
        """Whether others use so much that a process that wants all cores has to wait."""
        return self.others_cores is not None and self.others_cores > SHARE * self.cores

    @property
    def full(self) -> bool:
        """Whether others used much, and hardly anything was idle."""
        return (
            self.crowded
            and self.others_cores is not None
            and self.cores - self.own_cores - self.others_cores < SHARE * self.cores
        )

    @property
    def record(self) -> dict[str, float | None]:
        """Rounded values for the YAML records."""
        return {name: None if value is None else round(value, 3) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class MachineLoad:
    """Load of the machine before some work and during it; None for what was not measured."""

    before: Load | None = None
    during: Load | None = None

    @property
    def busy(self) -> bool | None:
        """Whether others used processor time that the work could have used; None if unknown. For work that is too short to
        measure by itself, the load before it has to show the same."""
        if self.during is None or self.during.others_cores is None:
            return None
        if self.during.seconds >= LEAST_S:
            return self.during.full
        if self.before is None or self.before.others_cores is None:
            return None
        return self.during.full and self.before.crowded

    @property
    def columns(self) -> dict[str, Any]:
        """Values of the :data:`COLUMNS` of ``throughput.csv``."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        if self.before is not None:
            row["load_before"] = self.before.record["load_average"]
        if self.during is not None:
            row |= {name: self.during.record[name] for name in ("cores", "own_cores", "others_cores", "cpu_pressure")}
            row["machine_busy"] = self.busy
        return row

    @property
    def record(self) -> dict[str, Any]:
        """Section ``load`` of the YAML records."""
        return {
            "before": self.before and self.before.record,
            "during": self.during and self.during.record,
            "busy": self.busy,
            "note": busy_note(self.columns),
        }


def busy_note(figures: Mapping[str, Any]) -> str | None:
    """Return a note that the machine was busy during a run, from its row of ``throughput.csv``; None if it was not, or if
    that is unknown."""
    if str(figures.get("machine_busy")) != "True":
        return None
    others, cores = float(figures["others_cores"]), float(figures["cores"])
    return f"other processes used {others:.1f} of {cores:g} cores while this ran; figures are not this machine's own"


def measure_load() -> Load:
    """Measure the present load; takes :data:`IDLE_MEASURE_S` seconds."""
    meter = LoadMeter()
    time.sleep(IDLE_MEASURE_S)
    return meter.end()


class LoadMeter:
    """Measures the load from its creation to each call of :meth:`end`."""

    def __init__(self) -> None:
        self._began = Reading.take()

    def end(self) -> Load:
        """Return the load so far."""
        return load_between(self._began, Reading.take())


@dataclass(frozen=True)
class Reading:
    """The system's counters at one time, in processor seconds, except ``at_s``, which is the clock's time in seconds.

    ``idle_s`` and ``counted_s`` have a value for each processor that this process may use, or fewer if the system does not
    show all of them. ``group_s`` is the use of the control group with the smallest quota.
    """

    at_s: float
    load_average: float | None
    processors: int
    quota: float | None
    idle_s: tuple[float, ...]
    counted_s: tuple[float, ...]
    own_s: float
    waited_s: float | None
    group_s: float | None

    @classmethod
    def take(
        cls,
        proc: Path = PROC,
        groups: Path = cgroup.ROOT,
        *,
        pid: int | None = None,
        processors: set[int] | None = None,
        at_s: float | None = None,
    ) -> "Reading":
        """Read the counters for process ``pid`` (default: this one) and those that it started, on ``processors`` (default:
        those that it may use)."""
        used = os.sched_getaffinity(0) if processors is None else processors
        member = proc / "self" / "cgroup"
        counts = _processor_counts(proc / "stat", used)
        quota, group_s = cgroup.cpu_quota(groups, member), cgroup.cpu_use(groups, member)
        return cls(
            time.monotonic() if at_s is None else at_s,
            _first_number(proc / "loadavg"),
            len(used),
            quota,
            tuple(sum(each[_IDLE]) / _TICKS_S for each in counts),
            tuple(sum(each[_COUNTED]) / _TICKS_S for each in counts),
            _tree_seconds(proc, os.getpid() if pid is None else pid),
            _waited_s(proc / "pressure" / "cpu"),
            group_s,
        )


def load_between(began: Reading, ended: Reading) -> Load:
    """Return the load between two readings."""
    seconds = max(ended.at_s - began.at_s, 1e-9)
    cores = min(float(ended.processors), ended.quota or float("inf"))
    own = max(0.0, ended.own_s - began.own_s) / seconds
    others = None
    if len(began.idle_s) == len(ended.idle_s) == ended.processors:
        counted = (sum(ended.counted_s) - sum(began.counted_s)) / seconds
        idle = (sum(ended.idle_s) - sum(began.idle_s)) / seconds
        if counted > ended.processors / 2:  # a sandbox may show constant numbers
            # from the clock, not from the other columns: those are sampled, the idle time is measured
            others = max(0.0, ended.processors - idle - own)
            others = max(0.0, others - (ended.processors - cores))  # processors that the quota leaves to others anyway
    if began.group_s is not None and ended.group_s is not None:
        others = max(others or 0.0, (ended.group_s - began.group_s) / seconds - own)
    waited = None
    if began.waited_s is not None and ended.waited_s is not None:
        waited = min(1.0, (ended.waited_s - began.waited_s) / seconds)
    return Load(seconds, began.load_average, cores, own, others, waited)


def _processor_counts(path: Path, used: set[int]) -> list[list[int]]:
    lines = (line.split() for line in _read(path).splitlines() if line.startswith("cpu"))
    by_name = {name: list(map(int, numbers)) for name, *numbers in lines}
    return [by_name[name] for name in (f"cpu{number}" for number in sorted(used)) if name in by_name]


def _tree_seconds(proc: Path, root: int) -> float:
    """Return the processor time of process ``root``, its living descendants, and the ended ones that were waited for."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for path in proc.glob("[0-9]*/stat"):
        fields = _read(path).rpartition(")")[2].split()  # from field 3 on: the name before it may contain anything
        if fields:
            pid = int(path.parent.name)
            children[int(fields[1])].append(pid)  # ppid
            ticks[pid] = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    total, left = 0, [root]
    while left:
        pid = left.pop()
        total += ticks.get(pid, 0)
        left += children[pid]
    return total / _TICKS_S


def _first_number(path: Path) -> float | None:
    numbers = _read(path).split()
    return float(numbers[0]) if numbers else None


def _waited_s(path: Path) -> float | None:
    """Return, in seconds, the total of the line ``some avg10=0.00 avg60=0.00 avg300=0.00 total=12345`` (microseconds)."""
    for line in _read(path).splitlines():
        if line.startswith("some"):
            return int(line.rpartition("total=")[2]) / 1e6
    return None


def _read(path: Path) -> str:
    with suppress(OSError):  # the process has ended, or this kernel has no such file
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
