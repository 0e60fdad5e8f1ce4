"""``splitwiser sweep``: a grid of runs from a YAML file, which a kill only pauses."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from splitwiser.check import check_quickly, check_thoroughly
from splitwiser.config import RunConfig
from splitwiser.errors import InputError, RunError, unknown_name
from splitwiser.files import read_yaml, write_rows
from splitwiser.options import typed_options
from splitwiser.results.busy import busy_runs, describe_busy
from splitwiser.results.paired import headline_metrics
from splitwiser.results.schema import METRIC, Column, names, shown_in
from splitwiser.results.terminal import columns
from splitwiser.study.capacity import check_load, measure_capacity, rate_at
from splitwiser.study.fresh_runs import NAME, RUN_COLUMNS, Execute, OneProcess, RoundsBar, check_one_process, run_once
from splitwiser.workload.config import WorkloadConfig

ROW = (
    Column("point", "Number of the setting in the sweep's file, from 1; empty if it is no longer there."),
    Column("round", "Number of the round, from 1."),
    Column("key", "Hash of the setting's whole configuration."),
)
COUNTS = (
    Column("finished", "Rounds that finished.", "runs"),
    Column("failed", "Rounds that failed.", "runs"),
    Column("busy", "Finished rounds in which the machine was busy.", "runs"),
)
CAPACITIES = (
    Column("question", "Hash of the model and the requests that the capacity holds for."),
    METRIC["request_throughput"],
)
OPTIONS = Column("...", "The options that the grid varies, one column each.")
TABLES = {
    "points.csv": (*ROW, OPTIONS, *RUN_COLUMNS),
    "capacity.csv": CAPACITIES,
    "sweep_summary.csv": (ROW[0], OPTIONS, *COUNTS, *shown_in("compare")),
}
KEYS = ("name", "figure", "repeats", "load", "base", "grid", "variants")
EXAMPLE = "{name: shares, repeats: 3, base: {model: opt-125m}, grid: {mode: [sequential, mp]}}"


@dataclass(frozen=True)
class Point:
    """One setting of the grid in ``file``: its number from 1, the options that vary, and all its options."""

    file: Path
    number: int
    varied: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def config(self) -> RunConfig:
        """Its full configuration. Raises :class:`InputError` naming the point."""
        try:
            return RunConfig(**typed_options(self.options, RunConfig))
        except InputError as error:
            raise InputError(f"{self.file}, {self}: {error}") from error

    def __str__(self) -> str:
        return f"point {self.number} ({', '.join(f'{name} {value}' for name, value in self.varied.items())})"

    @cached_property
    def key(self) -> str:
        """A hash of the full configuration, which does not depend on the point's place in the file."""
        return _hash({name: value for name, value in asdict(self.config).items() if name != "results"})

    @cached_property
    def question(self) -> str:
        """A hash of the model and the requests; points with the same one share a capacity, whatever their placement."""
        config = asdict(self.config)
        asked = [each.name for each in fields(WorkloadConfig)]
        return _hash({name: config[name] for name in ("model", "models", "load_format", "dtype", "seed", *asked)})


@dataclass(frozen=True)
class Sweep:
    """A sweep file. ``figure`` names the published figure that it corresponds to, if any; requests arrive at the fraction
    ``load`` of the rate of answers when all arrive at once, or, if it is None, as the points say."""

    name: str
    figure: str
    repeats: int
    points: Sequence[Point]
    load: float | None = None

    @property
    def varied(self) -> list[str]:
        """Names of the options that the grid varies."""
        return list(dict.fromkeys(name for point in self.points for name in point.varied))


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read_sweep(path: Path) -> Sweep:
    """Read ``{name, figure, repeats, load, base: {option: value}, grid: {option: value or list of values}, variants: {name:
    {option: value}}}``; ``grid`` may also be a list of such mappings, and one of ``grid`` and ``variants`` may be missing.
    A point is ``base``, overridden by one value of each list, then by the options of one variant; the first list varies
    slowest.

    Raises :class:`InputError` naming the file and the key; the values of options are checked by :attr:`Point.config`.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping, such as {EXAMPLE}")
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path}: {unknown_name('key', key, KEYS)}")
    name, repeats, base = content.get("name"), content.get("repeats", 1), content.get("base") or {}
    grids, variants, load = content.get("grid"), content.get("variants") or {}, content.get("load")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(
            f"{path}: 'name' must be letters, digits and any of . _ + -, since a folder is named so; not {name!r}"
        )
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise InputError(f"{path}: 'repeats' must be a whole number of 1 or more, not {repeats!r}")
    if load is not None and (isinstance(load, bool) or not isinstance(load, (int, float))):
        raise InputError(f"{path}: 'load' must be a fraction of the rate of answers, such as 0.6, not {load!r}")
    if not isinstance(base, dict):
        raise InputError(f"{path}: 'base' must map options to values, such as {{model: opt-125m}}")
    if not isinstance(variants, dict) or not all(isinstance(own, dict) for own in variants.values()):
        raise InputError(f"{path}: 'variants' must map names to options, such as {{apart: {{mode: mp}}}}")
    settings = [{}] if grids is None and variants else _settings(path, grids)
    points = [({**setting}, {**base, **setting}) for setting in settings]
    if variants:
        points = [
            ({**varied, "variant": variant}, {**options, **own})
            for varied, options in points
            for variant, own in variants.items()
        ]
    numbered = [Point(path, number, *point) for number, point in enumerate(points, 1)]
    return Sweep(name, str(content.get("figure") or "").strip(), repeats, numbered, load)


def _settings(path: Path, grid: Any) -> list[dict[str, Any]]:  # noqa: ANN401  # whatever a YAML file may hold
    """Return the settings of ``grid``, one or a list of such. Raises :class:`InputError`."""
    grids = grid if isinstance(grid, list) else [grid]
    if not grids or not all(isinstance(grid, dict) and grid for grid in grids):
        raise InputError(
            f"{path}: 'grid' must map options to lists of values, such as {{max_batch: [8, 64]}}, or list such maps"
        )
    for option, values in (item for grid in grids for item in grid.items()):
        if values == []:
            raise InputError(f"{path}: 'grid' lists no value for '{option}'")
    return [setting for grid in grids for setting in _product(grid)]


def _product(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    choices = [values if isinstance(values, list) else [values] for values in grid.values()]
    for chosen in itertools.product(*choices):
        yield dict(zip(grid, chosen, strict=True))


def list_points(grid: Sweep, results: Path) -> str:
    """Return a table of the points with the number of finished rounds. Raises :class:`InputError` for an invalid point."""
    folder = _folder(grid, results)
    grid = _at_load(grid, _read_capacities(folder))
    rows = _read_rows(folder, grid.points)
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
    """Run the unfinished runs of ``grid``, print the table of points and return the sweep's folder.

    A round covers the whole grid, so that a drift of the machine affects all points. ``points.csv`` gets a row when a run
    ends; finished runs are recognised by their full configuration, so a changed ``file`` runs only what it adds. Files that
    options refer to are assumed to be unchanged. With ``one_process``, all runs are in one process
    (:class:`~splitwiser.study.fresh_runs.OneProcess`). Raises :class:`InputError` before anything has run if a point is
    invalid; :class:`RunError`, after all others have run, if some failed.
    """
    if one_process:
        check_one_process(point.config for point in grid.points)
    _check_points(grid)
    folder = _folder(grid, results)
    if fresh and folder.exists():
        folder.rename(folder.with_name(f"{folder.name}_until_{datetime.now(UTC):%Y%m%dT%H%M%SZ}"))
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), OneProcess() if one_process else contextlib.nullcontext() as execute:
        shutil.copyfile(file, folder / "sweep.yaml")
        grid = _at_load(grid, _measure_capacities(grid, folder, execute))
        rows = _read_rows(folder, grid.points)
        written = _columns(folder, grid)
        done = {(row["key"], int(row["round"])) for row in rows if row["status"] == "finished"}
        turns = [(number, point) for number in range(1, grid.repeats + 1) for point in grid.points]
        left = [(number, point) for number, point in turns if (point.key, number) not in done]
        try:
            with RoundsBar(len(turns), len(turns) - len(left)) as bar:
                for number, point in left:
                    bar.begin(f"round {number}/{grid.repeats}, point {point.number}/{len(grid.points)}")
                    outcome = run_once(
                        typed_options(point.options, RunConfig), folder, f"round{number}_{point.key}", bar.show, execute
                    )
                    rows = [row for row in rows if (row["key"], int(row["round"])) != (point.key, number)]
                    rows.append(
                        {"point": point.number, "round": number, "key": point.key, **point.varied, **outcome.row}
                    )
                    write_rows(folder / "points.csv", written, rows)
                    bar.end(outcome)
        finally:
            failed = _conclude(folder, grid)
    if failed:
        raise RunError(f"{failed} of {len(turns)} runs failed; the same command tries them again; see {folder}")
    return folder


def _check_points(grid: Sweep) -> None:
    numbers: dict[str, int] = {}
    for point in grid.points:
        if "results" in point.options:
            raise InputError(f"{point.file}, {point}: 'results' is the sweep's; give it on the command line")
        if numbers.setdefault(point.key, point.number) != point.number:
            raise InputError(
                f"{point.file}, {point} is the same as point {numbers[point.key]}; 'repeats' runs points again"
            )
        with _naming(point):
            if grid.load is not None:
                check_load(grid.load, point.config)
            check_quickly(point.config)
    for point in grid.points:  # after what needs no PyTorch was checked of all
        with _naming(point):
            check_thoroughly(point.config)


@contextlib.contextmanager
def _naming(point: Point) -> Iterator[None]:
    """Have errors in the context begin with the point's file and settings."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{point.file}, {point}: {error}") from error


def _measure_capacities(grid: Sweep, folder: Path, execute: Execute | None) -> dict[str, float]:
    """Return the capacity for each :attr:`Point.question`, and measure those that are missing. ``capacity.csv`` keeps them,
    so that a resumed sweep uses the same rates. Empty if the sweep has no load."""
    capacities = _read_capacities(folder)
    missing: dict[str, Point] = {}
    for point in grid.points:
        if point.question not in capacities:
            missing.setdefault(point.question, point)
    if grid.load is None or not missing:
        return capacities
    with RoundsBar(len(missing)) as bar:
        for question, point in missing.items():
            options = typed_options(point.options, RunConfig)
            capacities[question] = measure_capacity(str(point), options, folder, f"capacity_{question}", bar, execute)
            rows = [{"question": key, "request_throughput": capacity} for key, capacity in capacities.items()]
            write_rows(folder / "capacity.csv", names(CAPACITIES), rows)
    return capacities


def _read_capacities(folder: Path) -> dict[str, float]:
    path = folder / "capacity.csv"
    if not path.exists():
        return {}
    rows = pd.read_csv(path, dtype={"question": str})
    return dict(zip(rows["question"], rows["request_throughput"], strict=True))


def _at_load(grid: Sweep, capacities: Mapping[str, float]) -> Sweep:
    """Return ``grid`` with the arrival rate added to the options of each point whose capacity is known."""
    if grid.load is None:
        return grid
    points = [
        replace(point, options={**point.options, "request_rate": rate_at(grid.load, capacities[point.question])})
        if point.question in capacities
        else point
        for point in grid.points
    ]
    return replace(grid, points=points)


def _folder(grid: Sweep, results: Path) -> Path:
    return results / f"sweep_{grid.name}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: another sweep is running here; wait for it, or give --results") from error
        yield


def _read_rows(folder: Path, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the rows of ``points.csv`` with the current numbers of ``points``; a point that was removed has no number."""
    path = folder / "points.csv"
    if not path.exists():
        return []
    numbers = {point.key: point.number for point in points}
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    return [{str(name): value for name, value in row.items()} | {"point": numbers.get(row["key"], "")} for row in rows]


def _columns(folder: Path, grid: Sweep) -> list[str]:
    """Return the columns of ``points.csv``: those that an earlier command wrote, and those of ``grid``."""
    path = folder / "points.csv"
    earlier = list(pd.read_csv(path, nrows=0).columns) if path.exists() else []
    return list(dict.fromkeys([*earlier, *names(ROW), *grid.varied, *names(RUN_COLUMNS)]))


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
    write_rows(folder / "sweep_summary.csv", list(summary.columns), table)
    brief = names(shown_in("sweep"))
    shown = [name for name in summary.columns if name in brief or name not in metrics]
    print(columns([shown, *([_cell(value) for value in row] for row in summary[shown].itertuples(index=False))]))
    if busy := describe_busy(rows, "point"):
        print(f"busy: {busy}")
    print(f"medians over the finished rounds; results: {folder}")
    return int(summary["failed"].sum())


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)
