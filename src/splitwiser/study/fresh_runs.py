"""Executes many runs of ``splitwiser run``, each in a fresh process or all in one, for the commands that need them."""

import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
from tqdm import tqdm

from splitwiser.config import RunConfig
from splitwiser.errors import InputError
from splitwiser.machine.load import busy_note
from splitwiser.options import to_arguments
from splitwiser.results.schema import THROUGHPUT, Column

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # a valid name of a file
LOOK_S = 0.5  # seconds between two reads of the current run's progress
STOP_S = 30.0  # most seconds that an interrupted run may take to write its results and end its workers

RUN_COLUMNS = (
    Column("status", "finished or failed."),
    Column("error", "Error message of a failed run; empty for a finished one."),
    *THROUGHPUT,
)

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_libc = ctypes.CDLL(None)  # loaded here: between fork and exec only the call itself is safe


@dataclass(frozen=True)
class Outcome:
    """How a run ended, its folder (None if it has none) and, if it finished, its row of ``throughput.csv`` as text."""

    status: Literal["finished", "failed"]
    error: str = ""
    directory: Path | None = None
    figures: dict[str, str] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, str]:
        """Its status, error and metrics: the values of :data:`RUN_COLUMNS`."""
        return {"status": self.status, "error": self.error, **self.figures}


Execute = Callable[[Sequence[str], Path, Callable[[str], None]], int]
"""Runs a ``splitwiser`` command, given its arguments, log file and a callback for its progress; returns the exit code."""


def run_once(
    options: Mapping[str, Any], folder: Path, label: str, show: Callable[[str], None], execute: Execute | None = None
) -> Outcome:
    """Run ``splitwiser run`` with ``options`` by ``execute``, or in its own process; its folder is created in
    ``folder/runs``, its output goes to ``folder/logs/<label>.log``. ``show`` is called with its progress.

    If this is interrupted, the run is ended first; if this process is killed, the run gets SIGTERM and ends itself.
    """
    runs, log = folder / "runs", folder / "logs" / f"{label}.log"
    runs.mkdir(parents=True, exist_ok=True)
    before = set(runs.iterdir())
    arguments = ["run", "--debug", *to_arguments({**options, "results": str(runs)})]
    returncode = (execute or _in_own_process)(arguments, log, show)
    made = sorted(path for path in set(runs.iterdir()) - before if path.is_dir())
    directory = made[-1] if made else None
    if returncode or directory is None:
        return Outcome("failed", _error(returncode, log), directory)
    row = pd.read_csv(directory / "throughput.csv", dtype=str, keep_default_na=False)
    return Outcome("finished", "", directory, {str(name): str(value) for name, value in row.iloc[0].items()})


def check_one_process(configs: Iterable[RunConfig]) -> None:
    """Refuse runs on a CPU, whose peak memory would include that of all earlier runs. Raises :class:`InputError`."""
    from splitwiser.machine.device import resolve_device  # imports PyTorch

    if any(resolve_device(config.device_name).type == "cpu" for config in configs):
        raise InputError("--one_process is for runs on a GPU: on a CPU the peak memory of a run is that of its process")


def _in_own_process(arguments: Sequence[str], log: Path, show: Callable[[str], None]) -> int:
    return run_process([sys.executable, "-m", "splitwiser", *arguments], log, show)


class OneProcess:
    """Executes runs one after another in one child process, so that imports happen only once: on a GPU, a run may be
    shorter than they are. After a failed run the next one gets a new process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, arguments: Sequence[str], log: Path, show: Callable[[str], None]) -> int:
        """See :data:`Execute`."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "splitwiser.run_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_end_with(os.getpid()),
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        with suppress(BrokenPipeError):  # the process has ended; the missing answer below says so
            process.stdin.write(json.dumps({"arguments": list(arguments), "log": str(log)}).encode() + b"\n")
            process.stdin.flush()
        try:
            while not select.select([process.stdout], [], [], LOOK_S)[0]:
                show(_progress(log))
        except BaseException:
            _end(process)
            raise
        answer = process.stdout.readline()
        code = int(answer) if answer else process.wait()
        if code or not answer:
            self._close()
            return code or 1
        return 0

    def _close(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        _wait_or_kill(process)


def run_process(command: Sequence[str], log: Path, show: Callable[[str], None]) -> int:
    """Run ``command`` in its own session with its output in ``log``; returns its exit code, negative for a signal. It is
    ended as described in :func:`run_once`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the run
            preexec_fn=_end_with(os.getpid()),
        )
        try:
            while not _ended(process):
                show(_progress(log))
        except BaseException:
            _end(process)
            raise
    return process.returncode


class RoundsBar:
    """A progress bar over runs; on a terminal it also shows the progress of the current run."""

    def __init__(self, total: int, done: int = 0) -> None:
        self._what = ""
        self._bar = tqdm(
            total=total,
            initial=done,
            smoothing=0,  # average over all runs, since they differ in length
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} runs, {elapsed}<{remaining}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, what: str) -> None:
        """Show the name of the run that starts now."""
        self._what = what
        self._bar.set_description_str(what)

    def show(self, progress: str) -> None:
        """Show the progress of the current run."""
        if sys.stderr.isatty():
            self._bar.set_description_str(f"{self._what}, {progress}" if progress else self._what)

    def end(self, outcome: Outcome) -> None:
        """Count the run; one that failed, or ran while the machine was busy, is named above the bar."""
        if outcome.status == "failed":
            tqdm.write(f"{self._what}: failed: {outcome.error}", file=sys.stderr)
        if note := busy_note(outcome.figures):
            tqdm.write(f"{self._what}: machine busy: {note}", file=sys.stderr)
        self._bar.update()


def _end_with(parent: int) -> Callable[[], None]:
    def ask_for_a_signal() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    return ask_for_a_signal


def _ended(process: "subprocess.Popen[bytes]") -> bool:
    try:
        process.wait(LOOK_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask the run to end, so that it writes its results."""
    process.terminate()
    _wait_or_kill(process)


def _wait_or_kill(process: "subprocess.Popen[bytes]") -> None:
    """Wait until the run has ended; kill it and its workers after :data:`STOP_S` or at another Ctrl-C."""
    try:
        process.wait(STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _progress(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 500))
        found = re.findall(rb"\d+/\d+ requests", file.read())
    return found[-1].decode() if found else ""


def _error(exit_code: int, log: Path) -> str:
    """Return the run's own error message, or how it ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix("splitwiser: ") for line in lines if line.startswith("splitwiser: ")]
    if said:
        return said[-1]
    return f"ended with exit code {exit_code}" if exit_code >= 0 else f"killed by {signal.Signals(-exit_code).name}"
