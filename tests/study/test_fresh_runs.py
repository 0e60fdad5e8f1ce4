"""What a run comes to, and runs one after another in one process."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from splitwiser.config import RunConfig
from splitwiser.study.fresh_runs import Execute, OneProcess, Outcome, RoundsBar, check_one_process, run_once
from tests.support.assertions import assert_says, refusal
from tests.support.processes import wait_for


def quiet(_: str) -> None:
    """Hears how far a run is."""


def ends_with(code: int, folder: Path) -> Execute:
    """A run that writes figures of what it has finished, then ends with ``code``."""

    def execute(_: Sequence[str], log: Path, __: Callable[[str], None]) -> int:
        (folder / "runs" / "made").mkdir()
        (folder / "runs" / "made" / "throughput.csv").write_text("run_id,output_throughput\nmade,5.0\n")
        log.parent.mkdir()
        log.touch()
        return code

    return execute


def test_a_finished_run_has_its_figures(tmp_path: Path) -> None:
    outcome = run_once({}, tmp_path, "first", quiet, ends_with(0, tmp_path))
    figures = {"run_id": "made", "output_throughput": "5.0"}
    assert outcome == Outcome("finished", "", tmp_path / "runs" / "made", figures)


@pytest.mark.parametrize(("code", "error"), [(1, "ended with exit code 1"), (-9, "killed by SIGKILL")])
def test_a_run_that_dies_half_way_has_failed_and_has_no_figures(code: int, error: str, tmp_path: Path) -> None:
    outcome = run_once({}, tmp_path, "first", quiet, ends_with(code, tmp_path))
    assert outcome == Outcome("failed", error, tmp_path / "runs" / "made")


@pytest.mark.parametrize("busy", ["True", "False", ""])
def test_a_run_on_a_busy_machine_is_named_as_it_ends(busy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with RoundsBar(1) as bar:
        bar.begin("round 1/3, mp")
        bar.end(Outcome("finished", figures={"machine_busy": busy, "others_cores": "1.62", "cores": "2.0"}))
    line = "round 1/3, mp: machine busy: other processes used 1.6 of 2 cores"
    assert (line in capsys.readouterr().err) is (busy == "True")


def test_runs_share_a_process_and_each_has_its_log(tmp_path: Path) -> None:
    with OneProcess() as execute:
        assert execute(["cases"], tmp_path / "logs" / "first.log", quiet) == 0
        first = process_of(execute)
        assert execute(["models"], tmp_path / "logs" / "second.log", quiet) == 0
        assert process_of(execute) == first
    assert "null prompt" in (tmp_path / "logs" / "first.log").read_text()
    assert "opt-125m" in (tmp_path / "logs" / "second.log").read_text()
    assert "opt-125m" not in (tmp_path / "logs" / "first.log").read_text()
    assert not is_alive(first)


def test_after_a_run_that_failed_the_next_has_another_process(tmp_path: Path) -> None:
    with OneProcess() as execute:
        assert execute(["cases"], tmp_path / "first.log", quiet) == 0
        first = process_of(execute)
        assert execute(["report", str(tmp_path / "nothing")], tmp_path / "failed.log", quiet) == 2
        assert "splitwiser: " in (tmp_path / "failed.log").read_text()
        assert execute(["cases"], tmp_path / "third.log", quiet) == 0
        assert process_of(execute) != first
    assert not is_alive(first)


def test_a_process_that_is_killed_fails_its_run_alone(tmp_path: Path) -> None:
    with OneProcess() as execute:
        assert execute(["cases"], tmp_path / "first.log", quiet) == 0
        os.kill(process_of(execute), signal.SIGKILL)
        assert execute(["cases"], tmp_path / "killed.log", quiet) == -signal.SIGKILL
        assert execute(["cases"], tmp_path / "third.log", quiet) == 0


def test_a_cpu_is_refused() -> None:
    assert_says(refusal(check_one_process, [RunConfig(device="cpu")]), "--one_process", "GPU", "peak memory")


def process_of(execute: OneProcess) -> int:
    assert execute._process is not None
    return execute._process.pid


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_broken_off_is_ended(end: type[BaseException], tmp_path: Path) -> None:
    def breaking_off(_: str) -> None:
        raise end

    with OneProcess() as execute:
        with pytest.raises(end):
            execute(["run", "--limit", "200", "--results", str(tmp_path)], tmp_path / "run.log", breaking_off)
        wait_for(lambda: not is_alive(process_of(execute)), "end of the run")
