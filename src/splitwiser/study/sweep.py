"""``splitwiser sweep``: a grid of runs from a YAML file, which a kill only pauses."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from splitwiser.check import check
from splitwiser.config import RunConfig
from splitwiser.errors import InputError, RunError, unknown
from splitwiser.options import typed_options
from splitwiser.results.busy import busy_runs, describe_busy
from splitwiser.results.terminal import columns
from splitwiser.study.fresh_runs import NAME, OneProcess, RoundsBar, check_one_process, run_once, write_rows
from splitwiser.study.paired import headline_metrics
from splitwiser.yaml_file import read_yaml

SHOWN = ("output_throughput", "median_ttft_ms", "median_itl_ms", "median_e2el_ms")
KEYS = ("name", "figure", "repeats", "base", "grid")
EXAMPLE = "{name: shares, repeats: 3, base: {model: opt-125m}, grid: {mode: [sequential, mp]}}"


@dataclass(frozen=True)
class Point:
    """One setting of the grid: its number from 1, what the grid says of it, and all its options."""

    number: int
    varied: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def config(self) -> RunConfig:
        """Its whole configuration. Raises :class:`InputError` naming the point."""
        try:
            return RunConfig(**typed_options(self.options, RunConfig))
        except InputError as error:
            raise InputError(f"point {self.number}: {error}") from error

    @cached_property
    def key(self) -> str:
        """A hash of the whole configuration: the same point has the same key wherever it stands in the file."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "results"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Sweep:
    """A sweep file. ``figure`` says which published figure it corresponds to, if any."""

    name: str
    figure: str
    repeats: int
    points: Sequence[Point]

    @property
    def varied(self) -> list[str]:
        """The options that the grid names."""
        return list(dict.fromkeys(name for point in self.points for name in point.varied))


def read_sweep(path: Path) -> Sweep:
    """Read ``{name, figure, repeats, base: {option: value}, grid: {option: value or list of values}}``; ``grid`` may also
    be a list of such mappings. A point is one value of each list, over ``base``; the first list turns slowest.

    Raises :class:`InputError` naming the file and the key; what the options say is checked by :attr:`Point.config`.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping, such as {EXAMPLE}")
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path}: {unknown('key', key, KEYS)}")
    name, repeats, base = content.get("name"), content.get("repeats", 1), content.get("base") or {}
    grids = content.get("grid")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(
            f"{path}: 'name' must be letters, digits and any of . _ + -, since a folder is named so; not {name!r}"
        )
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise InputError(f"{path}: 'repeats' must be a whole number of 1 or more, not {repeats!r}")
    if not isinstance(base, dict):
        raise InputError(f"{path}: 'base' must map options to values, such as {{model: opt-125m}}")
    grids = grids if isinstance(grids, list) else [grids]
    if not grids or not all(isinstance(grid, dict) and grid for grid in grids):
        raise InputError(
            f"{path}: 'grid' must map options to lists of values, such as {{max_batch: [8, 64]}}, or list such maps"
        )
    for option, values in (item for grid in grids for item in grid.items()):
        if values == []:
            raise InputError(f"{path}: 'grid' lists no value for '{option}'")
    settings = [setting for grid in grids for setting in _product(grid)]
    points = [Point(number, setting, {**base, **setting}) for number, setting in enumerate(settings, 1)]
    return Sweep(name, str(content.get("figure") or "").strip(), repeats, points)


def _product(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    choices = [values if isinstance(values, list) else [values] for values in grid.values()]
    for chosen in itertools.product(*choices):
        yield dict(zip(grid, chosen, strict=True))


def list_points(grid: Sweep, results: Path) -> str:
    """The points as a table, with how many of their rounds have finished. Raises :class:`InputError` for a wrong one."""
    rows = _read_rows(_folder(grid, results), grid.points)
    shown = [
        (
            str(point.number),
            *(str(point.varied.get(name, "")) for name in grid.varied),
            f"{_finished(rows, point)}/{grid.repeats}",
        )
        for point in grid.points
    ]
    return columns([("point", *grid.varied, "finished"), *shown])


def sweep(grid: Sweep, file: Path, results: Path, *, fresh: bool, one_process: bool = False) -> Path:
    """Run what of ``grid`` has not finished yet, print the table of points and return the sweep's folder.

    Rounds go over the whole grid, so that a drift of the machine falls on all points. ``points.csv`` gets a row a run as it
    ends; a run counts as finished by its whole configuration, so a changed ``file`` runs what it adds. Files that options
    name are taken to be unchanged. With ``one_process``, all runs are in one process
    (:class:`~splitwiser.study.fresh_runs.OneProcess`). Raises :class:`InputError` before anything has run if a point is
    wrong; :class:`RunError`, after all others have run, if some failed.
    """
    if one_process:
        check_one_process(point.config for point in grid.points)
    _check_points(grid.points)
    folder = _folder(grid, results)
    if fresh and folder.exists():
        folder.rename(folder.with_name(f"{folder.name}_until_{datetime.now(UTC):%Y%m%dT%H%M%SZ}"))
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        shutil.copyfile(file, folder / "sweep.yaml")
        rows = _read_rows(folder, grid.points)
        done = {(row["key"], int(row["round"])) for row in rows if row["status"] == "finished"}
        turns = [(number, point) for number in range(1, grid.repeats + 1) for point in grid.points]
        left = [(number, point) for number, point in turns if (point.key, number) not in done]
        try:
            with (
                RoundsBar(len(turns), len(turns) - len(left)) as bar,
                OneProcess() if one_process else contextlib.nullcontext() as execute,
            ):
                for number, point in left:
                    bar.begin(f"round {number}/{grid.repeats}, point {point.number}/{len(grid.points)}")
                    outcome = run_once(
                        typed_options(point.options, RunConfig), folder, f"round{number}_{point.key}", bar.show, execute
                    )
                    rows = [row for row in rows if (row["key"], int(row["round"])) != (point.key, number)]
                    rows.append(
                        {"point": point.number, "round": number, "key": point.key, **point.varied, **outcome.row}
                    )
                    write_rows(folder / "points.csv", rows)
                    bar.end(outcome)
        finally:
            failed = _conclude(folder, grid)
    if failed:
        raise RunError(f"{failed} of {len(turns)} runs failed; the same command tries them again; see {folder}")
    return folder


def _check_points(points: Sequence[Point]) -> None:
    numbers: dict[str, int] = {}
    for point in points:
        if "results" in point.options:
            raise InputError(f"point {point.number}: 'results' is the sweep's; give it on the command line")
        if numbers.setdefault(point.key, point.number) != point.number:
            raise InputError(
                f"point {point.number} is the same as point {numbers[point.key]}; 'repeats' runs points again"
            )
        try:
            check(point.config)
        except InputError as error:
            raise InputError(f"point {point.number} ({_described(point)}): {error}") from error


def _described(point: Point) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.varied.items())


def _folder(grid: Sweep, results: Path) -> Path:
    return results / f"sweep_{grid.name}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: another sweep is at work here; wait for it, or give --results") from error
        yield


def _read_rows(folder: Path, points: Sequence[Point]) -> list[dict[str, Any]]:
    """The rows of ``points.csv``, numbered as ``points`` now are; a point that is no longer there has no number."""
    path = folder / "points.csv"
    if not path.exists():
        return []
    numbers = {point.key: point.number for point in points}
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    return [{str(name): value for name, value in row.items()} | {"point": numbers.get(row["key"], "")} for row in rows]


def _finished(rows: Sequence[Mapping[str, Any]], point: Point) -> int:
    return sum(row["key"] == point.key and row["status"] == "finished" for row in rows)


def _conclude(folder: Path, grid: Sweep) -> int:
    """Write and print the table of points; returns how many of their runs failed."""
    if not (folder / "points.csv").exists():
        return 0
    rows = pd.read_csv(folder / "points.csv")
    metrics = headline_metrics(list(rows.columns))
    table = []
    for point in grid.points:
        own = rows[(rows["key"] == point.key) & (rows["round"] <= grid.repeats)]
        finished = own[own["status"] == "finished"]
        row = {"point": point.number, **{name: point.varied.get(name) for name in grid.varied}}
        row |= {"finished": len(finished), "failed": len(own) - len(finished), "busy": len(busy_runs(finished))}
        table.append(row | {metric: finished[metric].median() for metric in metrics})
    summary = pd.DataFrame(table)
    summary.to_csv(folder / "sweep_summary.csv", index=False)
    shown = [name for name in summary.columns if name in SHOWN or name not in metrics]
    print(columns([shown, *([_cell(value) for value in row] for row in summary[shown].itertuples(index=False))]))
    if busy := describe_busy(rows, "point"):
        print(f"busy: {busy}")
    print(f"medians over the finished rounds; results: {folder}")
    return int(summary["failed"].sum())


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)
