"""Sweeps: files, points and keys, and real ones that are killed and go on."""

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from splitwiser import constants
from splitwiser.config import RunConfig
from splitwiser.errors import RunError
from splitwiser.study.fresh_runs import Outcome
from splitwiser.study.sweep import Point, list_points, read_sweep, sweep
from splitwiser.workload.job import prepare_job
from tests.support.assertions import assert_says, refusal
from tests.support.commands import COMMAND, invoke, write_workload
from tests.support.processes import processes_naming, wait_for

pytestmark = pytest.mark.slow

SHIPPED = sorted((constants.DIR_CONFIGS / "sweeps").glob("*.yaml"))


def write(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump({"name": "tried", **content}, sort_keys=False))
    return path


# -- files


def test_a_grid_is_every_combination_over_the_base(tmp_path: Path) -> None:
    grid = read_sweep(
        write(
            tmp_path / "s.yaml",
            figure="none",
            repeats=2,
            base={"limit": 3, "max_batch": 1},
            grid=[{"mode": ["generate", "sequential"], "max_batch": [4, 8]}, {"mode": "mp"}],
        )
    )
    assert (grid.name, grid.figure, grid.repeats) == ("tried", "none", 2)
    assert grid.varied == ["mode", "max_batch"]
    assert [dict(point.options) for point in grid.points] == [
        {"limit": 3, "max_batch": 4, "mode": "generate"},
        {"limit": 3, "max_batch": 8, "mode": "generate"},
        {"limit": 3, "max_batch": 4, "mode": "sequential"},
        {"limit": 3, "max_batch": 8, "mode": "sequential"},
        {"limit": 3, "max_batch": 1, "mode": "mp"},
    ]
    assert [point.number for point in grid.points] == [1, 2, 3, 4, 5]
    assert grid.points[0].config == RunConfig(limit=3, max_batch=4, mode="generate")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"grids": {}}, ["unknown key 'grids'", "grid"]),
        ({"name": "a/b", "grid": {"mode": "mp"}}, ["'name' must be", "'a/b'"]),
        ({"repeats": 0, "grid": {"mode": "mp"}}, ["'repeats' must be a whole number of 1 or more, not 0"]),
        ({"base": [1], "grid": {"mode": "mp"}}, ["'base' must map options"]),
        ({}, ["'grid' must map options"]),
        ({"grid": [{"mode": "mp"}, 3]}, ["'grid' must map options"]),
        ({"grid": []}, ["'grid' must map options"]),
        ({"grid": {"mode": []}}, ["lists no value for 'mode'"]),
        ({"variants": ["mp"]}, ["'variants' must map names to options"]),
        ({"variants": {"apart": "mp"}}, ["'variants' must map names to options"]),
        ({"load": "half", "grid": {"mode": "mp"}}, ["'load' must be a fraction", "'half'"]),
    ],
)
def test_a_wrong_file_is_named(content: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "wrong.yaml", **content)
    assert_says(refusal(read_sweep, path), str(path), *parts)


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        ({"mode": ["sequential", "fast"]}, ["point 2 (mode fast): unknown mode 'fast'"]),
        ({"mode": ["sequential", "green"]}, ["point 2 (mode green): mode green"]),
        ({"max_bach": [1]}, ["point 1", "unknown option 'max_bach'"]),
        ({"limit": [2, 0]}, ["s.yaml, point 2 (limit 0): limit must be 1 or more"]),
        ({"max_batch": [64, "many"]}, ["point 2", "'many'"]),
        ({"limit": [2, 3, 2]}, ["point 3 (limit 2) is the same as point 1"]),
        ({"temperature": [0, 0.0]}, ["point 2 (temperature 0.0) is the same as point 1"]),
        ({"results": ["here"]}, ["point 1 (results here): 'results' is the sweep's"]),
        ({"model": ["radiology-opt", "opt-125"]}, ["point 2 (model opt-125): unknown model 'opt-125'"]),
    ],
)
def test_a_wrong_point_is_refused_before_anything_runs(grid: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", base={"case_id": 0}, grid=grid)
    assert_says(refusal(sweep, read_sweep(file), file, tmp_path / "out", fresh=False), *parts)
    assert not (tmp_path / "out").exists()


def test_what_needs_no_pytorch_is_checked_of_all_points_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thorough: list[RunConfig] = []
    monkeypatch.setattr("splitwiser.study.sweep.check_thoroughly", thorough.append)
    file = write(tmp_path / "s.yaml", grid={"data": ["models/data", "none.csv"]})
    line = refusal(sweep, read_sweep(file), file, tmp_path / "out", fresh=False)
    assert_says(line, "point 2 (data none.csv): data none.csv: no such file or directory")
    assert thorough == []


@pytest.mark.parametrize(
    ("base", "load", "parts"),
    [
        ({}, 0, ["point 1 (mode mp): load must be above 0"]),
        ({"request_rate": 3}, 0.6, ["point 1 (mode mp): a load sets when requests arrive", "request_rate"]),
    ],
)
def test_a_wrong_load_is_refused_before_anything_runs(
    base: dict[str, Any], load: float, parts: list[str], tmp_path: Path
) -> None:
    file = write(tmp_path / "s.yaml", load=load, base=base, grid={"mode": "mp"})
    assert_says(refusal(sweep, read_sweep(file), file, tmp_path / "out", fresh=False), *parts)
    assert not (tmp_path / "out").exists()


def test_every_setting_is_run_by_every_variant(tmp_path: Path) -> None:
    variants = {"alone": {"mode": "sequential"}, "apart, small": {"mode": "mp", "max_batch": 4}}
    content: dict[str, Any] = {"base": {"max_batch": 8}, "variants": variants}
    only = read_sweep(write(tmp_path / "s.yaml", **content))
    assert [(point.varied, point.options) for point in only.points] == [
        ({"variant": "alone"}, {"max_batch": 8, "mode": "sequential"}),
        ({"variant": "apart, small"}, {"max_batch": 4, "mode": "mp"}),
    ]
    both = read_sweep(write(tmp_path / "s.yaml", **content, grid={"limit": [2, 3]}))
    assert [tuple(point.varied.items()) for point in both.points] == [
        (("limit", limit), ("variant", name)) for limit in (2, 3) for name in variants
    ]


def test_a_key_is_of_what_runs_and_not_of_how_it_is_written() -> None:
    key = Point(Path("s.yaml"), 1, {}, {"limit": 3, "temperature": 0}).key
    assert Point(Path("s.yaml"), 9, {"limit": 3}, {"temperature": 0.0, "limit": 3}).key == key
    assert Point(Path("s.yaml"), 1, {}, {"limit": 3, "mode": constants.MODE}).key == key
    assert Point(Path("s.yaml"), 1, {}, {"limit": 4, "temperature": 0}).key != key


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_hold_points_that_can_be(path: Path) -> None:
    grid = read_sweep(path)
    assert grid.name == path.stem
    assert grid.figure
    for point in grid.points:
        assert prepare_job(point.config, point.config.seed).requests


def test_the_list_shows_the_points_and_runs_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", repeats=3, grid={"mode": ["sequential", "mp"], "limit": [2]})
    done = invoke("sweep", file, "--list", "--results", tmp_path / "out")
    assert done.returncode == 0
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["point", "mode", "limit", "finished"],
        ["1", "sequential", "2", "0/3"],
        ["2", "mp", "2", "0/3"],
    ]
    assert not (tmp_path / "out").exists()


# -- what is run again, and what is summed up


def sweep_with(outcomes: list[Outcome], file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], pd.DataFrame]:
    """Sweep ``file`` with runs that come to ``outcomes``; the runs that were asked for, and the summary."""
    asked: list[str] = []

    def run_once(options: dict[str, Any], _: Path, label: str, *__: object) -> Outcome:
        asked.append(f"{label.partition('_')[0]} of {options['limit']}")
        return outcomes.pop(0)

    monkeypatch.setattr("splitwiser.study.sweep.run_once", run_once)
    with contextlib.suppress(RunError):
        sweep(read_sweep(file), file, file.parent / "out", fresh=False)
    return asked, pd.read_csv(file.parent / "out" / "sweep_tried" / "sweep_summary.csv")


def finished(throughput: float) -> Outcome:
    return Outcome("finished", "", None, {"output_throughput": str(throughput)})


def test_what_failed_is_tried_again_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "s.yaml", grid={"limit": [2, 3, 4]})
    failed = Outcome("failed", "killed by SIGKILL")
    assert sweep_with([finished(1), failed, finished(3)], file, monkeypatch)[0] == [f"round1 of {n}" for n in (2, 3, 4)]
    assert sweep_with([failed], file, monkeypatch)[0] == ["round1 of 3"]
    asked, summary = sweep_with([finished(2)], file, monkeypatch)
    assert asked == ["round1 of 3"]
    assert summary[["finished", "failed", "output_throughput"]].values.tolist() == [[1, 0, 1], [1, 0, 2], [1, 0, 3]]


def test_rounds_beyond_the_repeats_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {"limit": 2}
    sweep_with([finished(each) for each in (5, 70, 90)], write(tmp_path / "s.yaml", repeats=3, grid=grid), monkeypatch)
    asked, summary = sweep_with([], write(tmp_path / "s.yaml", repeats=1, grid=grid), monkeypatch)
    assert asked == []
    assert summary[["finished", "output_throughput"]].values.tolist() == [[1, 5]]


def test_arrivals_are_at_a_load_of_the_first_points_capacity_which_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []

    def run_once(options: dict[str, Any], _: Path, label: str, *__: object) -> Outcome:
        asked.append((label.partition("_")[0], options["request_rate"]))
        figures = {"request_throughput": str(10 * options["limit"]), "output_throughput": "1"}
        return Outcome("finished", "", None, figures)

    for module in ("sweep", "capacity"):
        monkeypatch.setattr(f"splitwiser.study.{module}.run_once", run_once)
    content: dict[str, Any] = {"load": 0.6, "grid": {"limit": [2, 3], "mode": ["sequential", "mp"]}}
    file = write(tmp_path / "s.yaml", **content)
    sweep(read_sweep(file), file, tmp_path / "out", fresh=False)
    capacities = [("capacity", float("inf"))] * 2
    assert asked == [*capacities, *[("round1", 12.0)] * 2, *[("round1", 18.0)] * 2]
    asked.clear()
    file = write(tmp_path / "s.yaml", repeats=2, **content)
    sweep(read_sweep(file), file, tmp_path / "out", fresh=False)
    assert asked == [*[("round2", 12.0)] * 2, *[("round2", 18.0)] * 2]
    assert "2/2" in list_points(read_sweep(file), tmp_path / "out")


def test_points_on_a_busy_machine_are_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = {"cores": "2.0", "others_cores": "1.62"}
    busy, quiet = ({**finished(5).figures, **load, "machine_busy": each} for each in ("True", "False"))
    outcomes = [Outcome("finished", "", None, figures) for figures in (quiet, busy)]
    _, summary = sweep_with(outcomes, write(tmp_path / "s.yaml", grid={"limit": [2, 3]}), monkeypatch)
    assert summary["busy"].tolist() == [0, 1]
    assert "busy: the machine was busy in 1 of 2 runs: point 2 in round 1; other" in capsys.readouterr().out


# -- real ones


def rows_of(tmp_path: Path) -> pd.DataFrame:
    return pd.read_csv(tmp_path / "out" / "sweep_tried" / "points.csv")


def run_sweep(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return invoke("sweep", tmp_path / "s.yaml", "--results", tmp_path / "out", *options)


def state(folder: Path) -> dict[str, int]:
    """When each file was last written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.usefixtures("runs_here")
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    short = write_workload(tmp_path / "short.json", [[5, 6], [7]])
    changing = write_workload(tmp_path / "changing.json", [[5], [6]], arrival_s=[0, 3600])
    file = tmp_path / "s.yaml"
    base = {"model": str(tiny("opt")), "ignore_eos": True}
    write(file, base=base, grid={"workload": [str(short), str(changing)]})

    process = subprocess.Popen(
        [*COMMAND, "sweep", file, "--results", tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    runs = tmp_path / "out" / "sweep_tried" / "runs"
    wait_for(lambda: len(list(runs.glob("*changing*/latency.csv"))) == 1, "second point")
    assert_says(invoke("sweep", file, "--results", tmp_path / "out").stderr, "another sweep is running here")
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not processes_naming(tmp_path / "out"), "end of the run")
    assert rows_of(tmp_path)[["point", "status"]].values.tolist() == [[1, "finished"]]
    (finished,) = runs.glob("*short*")
    before = state(finished)

    write_workload(changing, [[5], [6]])
    refused = {"model": str(tiny("roformer")), "workload": str(short)}
    write(file, base=base, grid=[{"workload": str(changing)}, refused, {"workload": str(short)}])
    done = run_sweep(tmp_path)
    assert done.returncode == 1
    assert "1 of 3 runs failed; the same command tries them again" in done.stderr.splitlines()[-1]
    rows = rows_of(tmp_path)
    assert rows[["point", "status"]].values.tolist() == [[3, "finished"], [1, "finished"], [2, "failed"]]
    assert rows["run_id"][0] == finished.name
    assert state(finished) == before
    assert len(list(runs.glob("*short*"))) == 1

    before, logs = state(runs), state(runs.with_name("logs"))
    assert run_sweep(tmp_path).returncode == 1
    assert state(runs) == before
    assert rows_of(tmp_path)["status"].tolist() == ["finished", "finished", "failed"]
    tried = [name for name, moment in state(runs.with_name("logs")).items() if logs[name] != moment]
    assert tried == [f"round1_{rows['key'][2]}.log"]


@pytest.mark.usefixtures("runs_here")
def test_rounds_go_over_the_whole_grid_and_are_summed_up(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    workload = write_workload(tmp_path / "w.json", [[5, 6], [7]])
    write(
        tmp_path / "s.yaml",
        repeats=2,
        base={"model": str(tiny("opt")), "workload": str(workload), "ignore_eos": True},
        grid={"max_batch": [1, 2]},
    )
    done = run_sweep(tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert rows[["round", "point", "max_batch"]].values.tolist() == [[1, 1, 1], [1, 2, 2], [2, 1, 1], [2, 2, 2]]
    summary = pd.read_csv(tmp_path / "out" / "sweep_tried" / "sweep_summary.csv")
    assert summary[["point", "max_batch", "finished", "failed"]].values.tolist() == [[1, 1, 2, 0], [2, 2, 2, 0]]
    for metric in ("output_throughput", "p99_ttft_ms", "ready_s"):
        expected = [np.median(rows[rows["point"] == point][metric]) for point in (1, 2)]
        assert summary[metric].tolist() == pytest.approx(expected)
    assert "4/4" in done.stderr

    old = state(tmp_path / "out" / "sweep_tried" / "runs")
    write(tmp_path / "s.yaml", base={"model": str(tiny("opt")), "workload": str(workload)}, grid={"max_batch": 1})
    assert run_sweep(tmp_path, "--fresh").returncode == 0
    assert len(rows_of(tmp_path)) == 1
    (kept,) = (tmp_path / "out").glob("sweep_tried_until_*")
    assert state(kept / "runs") == old
