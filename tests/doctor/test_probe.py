"""Questions asked in processes of their own: answers, reasons, and nothing left behind."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from splitwiser.doctor import probe
from splitwiser.doctor.probe import ProbeError, ask, ask_ahead, run_command


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


@pytest.mark.slow
def test_memory_reaches_a_second_process_and_back() -> None:
    assert ask("shares", "cpu", deadline_s=100) is None


@pytest.mark.slow
def test_an_answer_is_what_the_probe_returned() -> None:
    assert ask("mode", "green", "cpu", deadline_s=100) == "needs an NVIDIA GPU, and the device is cpu"
    assert ask("mode", "sequential", "cpu", deadline_s=100) is None


def test_a_command_is_given_text_and_answers() -> None:
    assert run_command(["cat"], 10, "a line\n") == "a line\n"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["/nowhere/tool"], "/nowhere/tool: No such file or directory"),
        (python("import sys; sys.exit(3)"), "exit code 3"),
        (python("import sys; sys.exit('no driver')"), "no driver"),
        (python("import os; os.abort()"), "killed by SIGABRT"),
        (python("raise RuntimeError('CUDA error: busy\\nCompile with X')"), "RuntimeError: CUDA error: busy"),
    ],
)
def test_a_failure_has_a_reason_on_one_line(command: list[str], reason: str) -> None:
    with pytest.raises(ProbeError) as caught:
        run_command(command, 20)
    assert str(caught.value) == reason


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    script = (
        "import subprocess, pathlib, time\n"
        f"child = subprocess.Popen(['sleep', '600']); pathlib.Path({str(started)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    with pytest.raises(ProbeError, match="no answer within 2 s"):
        run_command(python(script), 2)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{started.read_text()}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{started.read_text()}").exists()


@pytest.mark.slow
def test_what_was_asked_ahead_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def noting(command: list[str], *given: Any) -> str:
        started.append(command)
        return run_command(command, *given)

    monkeypatch.setattr(probe, "run_command", noting)
    ask_ahead("mode", "green", "cpu", deadline_s=100)
    for expected in (1, 2):  # an answer is for one question
        assert ask("mode", "green", "cpu", deadline_s=100) == "needs an NVIDIA GPU, and the device is cpu"
        assert len(started) == expected


def test_a_question_asked_ahead_has_its_reason_too() -> None:
    ask_ahead("nonsense", deadline_s=100)
    with pytest.raises(ProbeError, match="KeyError: 'nonsense'"):
        ask("nonsense", deadline_s=100)
