"""Other processes: waiting for what they do, and finding them and what they leave."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)


def processes_naming(path: Path) -> list[int]:
    """Processes with ``path`` in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(path).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def session_of(pid: int) -> list[int]:
    """All processes of the session that ``pid`` leads."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def abandoned_segments() -> set[Path]:
    """Segments of this user's shared memory that no process has open or mapped: others come and go with other programs."""
    found = set()
    for path in Path("/dev/shm").iterdir():
        with suppress(OSError):  # it has gone since
            if path.stat().st_uid == os.getuid():
                found.add(path)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or it has ended since
            found -= {Path(os.path.realpath(link)) for link in (process / "fd").iterdir()}
            found -= {path for path in found if f"{path}\n" in (process / "maps").read_text()}
    return found
