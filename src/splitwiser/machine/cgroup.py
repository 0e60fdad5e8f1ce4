"""Limits of this process's control groups (v2 and v1), which containers and service managers set on memory and processors.

The files are described in the kernel documentation, admin-guide/cgroup-v2 and admin-guide/cgroup-v1/memory.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def memory_headroom(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Return the bytes that this process may still allocate within the limits of its group and those above it; None
    without a limit.

    Cached files that can be dropped at once do not count as used.
    """
    headrooms = (_headroom(group) for group in _groups("memory", root, membership))
    return min((each for each in headrooms if each is not None), default=None)


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Return the smallest quota of this process's group and those above it, in processors; None without a limit."""
    quotas = (_quota(group) for group in _groups("cpu", root, membership))
    return min((quota for quota in quotas if quota is not None), default=None)


def cpu_use(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Return the processor seconds that the group with the smallest quota has used so far; None without a quota, or if the
    system does not report it."""
    limited = [(quota, group) for group in _groups("cpu", root, membership) if (quota := _quota(group)) is not None]
    if not limited:
        return None
    _, group = min(limited, key=lambda each: each[0])
    stat = dict(line.split() for line in _read(group / "cpu.stat").splitlines())
    if "usage_usec" in stat:
        return int(stat["usage_usec"]) / 1e6
    nanoseconds = _read(
        group / "cpuacct.usage"
    )  # version 1, whose controllers cpu and cpuacct nearly always share a folder
    return int(nanoseconds) / 1e9 if nanoseconds.isdecimal() else None


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Yield the directories of the groups in which ``controller`` limits this process, from its own upwards."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = root / "unified" if (root / "unified").is_dir() else root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        # a container may see the host's path, but have only its own group mounted: then only the base exists
        group = base / Path(*(part for part in path.split("/") if part not in ("", "..")))
        yield from (each for each in [group, *group.parents] if each.is_relative_to(base) and each.is_dir())


def _headroom(group: Path) -> int | None:
    for limit_file, usage_file, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _read(group / limit_file), _read(group / usage_file)
        if limit.isdecimal() and usage.isdecimal() and int(limit) < _NO_LIMIT:
            stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            return max(0, int(limit) - int(usage) + int(stat.get(droppable, 0)))
    return None


_NO_LIMIT = 1 << 60  # v1 reports no limit as the largest number of pages


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
