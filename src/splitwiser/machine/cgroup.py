"""What a container or a service manager lets this process use: memory and processors of its control groups, v2 and v1.

Files and their meanings: kernel documentation, admin-guide/cgroup-v2 and admin-guide/cgroup-v1/memory.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def memory_headroom(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that this process may still take before a limit of its group, or of one above it, is met; None without a limit.

    Cached files that can be dropped at once do not count as taken.
    """
    rooms = (_room(group) for group in _groups("memory", root, membership))
    return min((room for room in rooms if room is not None), default=None)


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """How many processors' time the group of this process, or one above it, may take; None without a limit."""
    quotas = (_quota(group) for group in _groups("cpu", root, membership))
    return min((quota for quota in quotas if quota is not None), default=None)


def cpu_use(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Seconds of processors that the group with the tightest quota has used so far; None without a quota, or where the
    system does not say."""
    limited = [(quota, group) for group in _groups("cpu", root, membership) if (quota := _quota(group)) is not None]
    if not limited:
        return None
    _, group = min(limited, key=lambda each: each[0])
    stat = dict(line.split() for line in _read(group / "cpu.stat").splitlines())
    if "usage_usec" in stat:
        return int(stat["usage_usec"]) / 1e6
    nanoseconds = _read(group / "cpuacct.usage")  # version 1, whose two controllers are nearly always one folder
    return int(nanoseconds) / 1e9 if nanoseconds.isdecimal() else None


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Directories of the groups that ``controller`` limits this process by, from its own up."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = root / "unified" if (root / "unified").is_dir() else root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        # a container may see the path that its host knows, but only its own group mounted: then none but the base is there
        group = base / Path(*(part for part in path.split("/") if part not in ("", "..")))
        yield from (each for each in [group, *group.parents] if each.is_relative_to(base) and each.is_dir())


def _room(group: Path) -> int | None:
    for limit_file, usage_file, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _read(group / limit_file), _read(group / usage_file)
        if limit.isdecimal() and usage.isdecimal() and int(limit) < _NO_LIMIT:
            stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            return max(0, int(limit) - int(usage) + int(stat.get(droppable, 0)))
    return None


_NO_LIMIT = 1 << 60  # v1 has no word for it and gives the greatest number of pages


def _quota(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None  # max, or -1: no limit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
