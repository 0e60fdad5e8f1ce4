"""A run that lasts, in a session of its own, to be killed and interrupted."""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.commands import COMMAND, write_workload
from tests.support.processes import session_of, wait_for

STAGES: dict[str, Callable[[list[str]], bool]] = {  # how far a start is, by the names of its processes
    "fork server": lambda names: len(names) > 1,
    "first worker": lambda names: "prefill-0" in names or "decode-0" in names,
    "last worker": lambda names: "prefill-0" in names and "decode-0" in names,
}


class Running:
    """``splitwiser run`` in a session of its own, with a request that lasts and three that are finished."""

    def __init__(
        self,
        tmp_path: Path,
        model: Path,
        mode: str = "mp",
        command: Sequence[str] = COMMAND,
        options: Sequence[str | Path] = (),
    ) -> None:
        self.results = tmp_path / "out"
        workload = write_workload(tmp_path / "w.json", [[5]] * 3 + [[6]], 200, arrival_s=[0, 0, 0, 3600])
        self.process = subprocess.Popen(
            [*command, "run", "--mode", mode, "--model", model, "--workload", workload, "--ignore_eos",
             "--results", self.results, *options],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def wait_until_three_are_finished(self) -> None:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            found = list(self.results.glob("*/latency.csv"))
            if found and len(found[0].read_text().splitlines()) == 4:
                return
            time.sleep(0.05)
        raise AssertionError("the first three requests did not reach the disk")

    def wait_for_stage(self, stage: str) -> None:
        wait_for(lambda: STAGES[stage](list(self.processes().values())), stage)

    def processes(self) -> dict[int, str]:
        """The names of the session's processes."""
        found = {}
        for pid in session_of(self.process.pid):
            with suppress(OSError):  # it has ended since
                found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
        return found

    def worker(self, name: str) -> int:
        (pid,) = (pid for pid, own in self.processes().items() if own == name)
        return pid

    def ended(self) -> str:
        # until its last process has ended: the fork server notices an end only after its imports, which take long under load
        _, errors = self.process.communicate(timeout=150)
        assert self.left_over() == []
        return errors

    def left_over(self) -> list[int]:
        """Processes of the session that are still there when they have had three seconds to end."""
        deadline = time.monotonic() + 3
        while session_of(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        return session_of(self.process.pid)
