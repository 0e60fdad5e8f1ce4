"""How much memory can be had."""

from pathlib import Path

import psutil
import pytest

from splitwiser.machine.memory import available_memory


@pytest.fixture
def limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 3,000 KiB available, and a process in a control group of no limit yet."""
    kib = {"MemTotal": 4000, "MemFree": 1000, "MemAvailable": 3000, "Cached": 2500}
    kib |= dict.fromkeys(("Buffers", "Shmem", "Active", "Inactive"), 1)
    (tmp_path / "meminfo").write_text("".join(f"{name}: {number} kB\n" for name, number in kib.items()))
    (tmp_path / "self").write_text("0::/\n")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    return tmp_path


def test_it_is_what_the_system_calls_available(limits: Path) -> None:
    assert available_memory(limits, limits / "self") == 3000 * 1024


def test_it_is_no_more_than_a_container_lets_be_used(limits: Path) -> None:
    for name, content in (("memory.max", 3000), ("memory.current", 1000)):
        (limits / name).write_text(f"{content}\n")
    assert available_memory(limits, limits / "self") == 2000
