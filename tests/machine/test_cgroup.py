"""What a container lets a process use, read from trees of files as the kernel lays them out."""

from pathlib import Path

import pytest

from splitwiser.machine.cgroup import cpu_quota, cpu_use, memory_headroom

MIB = 1 << 20
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def group(directory: Path, **files: object) -> None:
    """A control group; a file's name is given with ``__`` for its dot."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def member(root: Path, *lines: str) -> Path:
    path = root.parent / "self"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def v2(limit: object, current: int, inactive: int = 0) -> dict[str, object]:
    stat = f"anon 5\ninactive_file {inactive}\nactive_file 7"
    return {"memory__max": limit, "memory__current": current, "memory__stat": stat}


def v1(limit: int, usage: int, inactive: int = 0) -> dict[str, object]:
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}"
    return {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": usage, "memory__stat": stat}


def test_room_is_the_limit_less_what_is_taken(root: Path) -> None:
    group(root / "app", **v2(512 * MIB, 200 * MIB))
    assert memory_headroom(root, member(root, "0::/app")) == 312 * MIB


def test_files_that_can_be_dropped_leave_room(root: Path) -> None:
    group(root / "app", **v2(512 * MIB, 500 * MIB, inactive=100 * MIB))
    assert memory_headroom(root, member(root, "0::/app")) == 112 * MIB


def test_the_tightest_group_on_the_way_up_counts(root: Path) -> None:
    group(root, cgroup__controllers="memory")
    group(root / "pod", **v2(300 * MIB, 250 * MIB))
    group(root / "pod" / "app", **v2(200 * MIB, 20 * MIB))
    group(root / "other", **v2(MIB, 0))
    assert memory_headroom(root, member(root, "0::/pod/app")) == 50 * MIB


def test_a_group_over_its_limit_leaves_nothing(root: Path) -> None:
    group(root / "app", **v2(MIB, 2 * MIB))
    assert memory_headroom(root, member(root, "0::/app")) == 0


def test_without_a_limit_there_is_none_to_meet(root: Path) -> None:
    group(root / "app", **v2("max", MIB))
    assert memory_headroom(root, member(root, "0::/app")) is None
    group(root / "memory", **v1(UNLIMITED_V1, MIB))
    assert memory_headroom(root, member(root, "4:memory:/", "0::/")) is None


def test_version_1_counts_the_files_of_groups_below(root: Path) -> None:
    group(root / "memory" / "job", **v1(100 * MIB, 80 * MIB, inactive=30 * MIB))
    assert memory_headroom(root, member(root, "9:cpu,cpuacct:/", "4:memory:/job", "0::/")) == 50 * MIB


def test_a_host_path_that_the_container_does_not_have_falls_back_on_its_root(root: Path) -> None:
    group(root / "memory", **v1(100 * MIB, 60 * MIB))
    assert memory_headroom(root, member(root, "4:memory:/docker/0123abc")) == 40 * MIB
    group(root, **v2(80 * MIB, 60 * MIB))
    assert memory_headroom(root, member(root, "0::/../../elsewhere")) == 20 * MIB


def test_version_2_beside_version_1_lies_in_its_own_folder(root: Path) -> None:
    group(root / "unified" / "app", **v2(100 * MIB, 60 * MIB))
    assert memory_headroom(root, member(root, "3:cpu:/", "0::/app")) == 40 * MIB


def test_no_control_groups_at_all(root: Path) -> None:
    assert memory_headroom(root, root / "nowhere") is None
    assert cpu_quota(root, member(root, "0::/app")) is None


@pytest.mark.parametrize(("text", "processors"), [("150000 100000", 1.5), ("max 100000", None)])
def test_processor_quota(text: str, processors: float | None, root: Path) -> None:
    group(root / "app", cpu__max=text)
    assert cpu_quota(root, member(root, "0::/app")) == processors


@pytest.mark.parametrize(("quota", "processors"), [(50000, 0.5), (-1, None)])
def test_processor_quota_of_version_1(quota: int, processors: float | None, root: Path) -> None:
    group(root / "cpu" / "job", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    assert cpu_quota(root, member(root, "9:cpu,cpuacct:/job")) == processors


def test_what_the_group_of_the_tightest_quota_used(root: Path) -> None:
    group(root / "pod", cpu__max="400000 100000", cpu__stat="usage_usec 9000000\nnr_periods 4")
    group(root / "pod" / "app", cpu__max="150000 100000", cpu__stat="usage_usec 2500000\nnr_periods 4")
    assert cpu_use(root, member(root, "0::/pod/app")) == 2.5


def test_what_a_group_of_version_1_used(root: Path) -> None:
    group(root / "cpu" / "job", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000, cpu__stat="nr_periods 4")
    assert cpu_use(root, member(root, "9:cpu,cpuacct:/job")) is None
    group(root / "cpu" / "job", cpuacct__usage=1_500_000_000)
    assert cpu_use(root, member(root, "9:cpu,cpuacct:/job")) == 1.5


def test_what_a_group_without_a_quota_used_is_not_asked(root: Path) -> None:
    group(root / "app", cpu__max="max 100000", cpu__stat="usage_usec 2500000")
    assert cpu_use(root, member(root, "0::/app")) is None
