"""Reads the folders that the commands write. The name of the record in a folder says what it is: a run, a comparison, a
sweep, a profile or an advice."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import yaml

from splitwiser.errors import InputError
from splitwiser.machine.stand_in import is_stand_in
from splitwiser.results.schema import CEILINGS, DECODE, GENERATIONS, LATENCY, PREFILL, STEPS, Column

ROW_NUMBERS = ("point", "round", "repeat", "key")  # of a sweep's points.csv


@dataclass(frozen=True)
class Run:
    """A run's folder: its record, its row of ``throughput.csv`` (empty if it was not written) and its tables."""

    path: Path
    record: dict[str, Any]
    figures: dict[str, Any]
    steps: pd.DataFrame
    latency: pd.DataFrame
    generations: pd.DataFrame

    @property
    def mode(self) -> str:
        """The mode it ran in."""
        configuration = self.record.get("configuration")
        configured = configuration.get("mode") if isinstance(configuration, dict) else None
        return str(self.figures.get("mode") or configured or "run")


@dataclass(frozen=True)
class Comparison:
    """A comparison's folder: one row per run, how the tokens differ, and the folders of the finished runs by run id."""

    path: Path
    record: dict[str, Any]
    rows: pd.DataFrame
    tokens: pd.DataFrame
    runs: dict[str, Run]


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder: one row per point and round."""

    path: Path
    record: dict[str, Any]
    points: pd.DataFrame

    @property
    def options(self) -> list[str]:
        """Names of the columns that tell the points apart: the options that the grid varies, which are those before
        ``status`` except the row numbers, and if these do not suffice the workers or else the point's number."""
        columns = list(self.points.columns)
        options = [name for name in columns[: columns.index("status")] if name not in ROW_NUMBERS]
        choices = [options, *([*options, more] for more in ("workers", "point") if more in columns)]
        return next((names for names in choices if self._tells_apart(names)), options)

    def _tells_apart(self, columns: Sequence[str]) -> bool:
        settings = self.points[[*columns, "point"]].drop_duplicates()
        return not settings.duplicated(subset=list(columns)).any()


@dataclass(frozen=True)
class Profile:
    """A profile's folder: tables with one row per prefill step, decode step and measured ceiling."""

    path: Path
    record: dict[str, Any]
    prefill: pd.DataFrame
    decode: pd.DataFrame
    ceilings: pd.DataFrame


@dataclass(frozen=True)
class Advice:
    """An advice's folder: the recommendation, predictions and checks, and the underlying profile if it is in the folder."""

    path: Path
    record: dict[str, Any]
    predictions: pd.DataFrame
    checks: pd.DataFrame
    profile: Profile | None


Folder = Run | Comparison | Sweep | Profile | Advice


def read_folder(path: Path) -> Folder:
    """Read the folder at ``path``. Raises :class:`InputError` if it is not a folder of results or cannot be read."""
    if not path.is_dir():
        raise InputError(
            f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give one that a command wrote"
        )
    for name, read in _READERS.items():
        if (path / name).is_file():
            return read(path, _read_record(path / name))
    inside = sorted(marker.parent.name for name in _READERS for marker in path.glob(f"*/{name}"))
    hint = f"; did you mean a folder in it, such as {path / inside[-1]}?" if inside else ""
    raise InputError(f"{path}: not a folder of results: it contains none of {', '.join(_READERS)}{hint}")


def are_stand_ins(folder: Folder) -> set[bool]:
    """Return whether the runs of ``folder`` used a stand-in for a GPU: {True}, {False}, or both if only some did."""
    match folder:
        case Comparison(rows=table) | Sweep(points=table):
            finished = table[table.status == "finished"]
            return {is_stand_in(device) for device in finished["device"]} if "device" in table else {False}
        case _:
            machine = folder.record.get("machine")
            return {isinstance(machine, dict) and is_stand_in(machine.get("gpu"))}


def _read_run(path: Path, record: dict[str, Any]) -> Run:
    throughput = _read_table(path / "throughput.csv", required=("output_throughput",), optional=True)
    return Run(
        path,
        record,
        {} if throughput.empty else {str(name): value for name, value in throughput.iloc[0].items()},
        _read_columns(path / "steps.csv", STEPS),
        _read_columns(path / "latency.csv", LATENCY),
        _read_columns(path / "generations.csv", GENERATIONS),
    )


def _read_comparison(path: Path, record: dict[str, Any]) -> Comparison:
    rows = _read_table(path / "comparison.csv", required=("round", "variant", "status"), optional=True)
    named = list(map(str, rows["run_id"].dropna())) if "run_id" in rows else []
    runs = {name: path / "runs" / name for name in named}
    return Comparison(
        path,
        record,
        rows,
        _read_table(path / "comparison_tokens.csv", required=(), optional=True),
        {
            name: _read_run(folder, _read_record(folder / "run.yaml"))
            for name, folder in runs.items()
            if (folder / "run.yaml").is_file()
        },
    )


def _read_sweep(path: Path, record: dict[str, Any]) -> Sweep:
    return Sweep(path, record, _read_table(path / "points.csv", required=("point", "status")))


def _read_profile(path: Path, record: dict[str, Any]) -> Profile:
    return Profile(
        path,
        record,
        _read_columns(path / "prefill.csv", PREFILL),
        _read_columns(path / "decode.csv", DECODE),
        _read_columns(path / "ceilings.csv", CEILINGS),
    )


def _read_advice(path: Path, record: dict[str, Any]) -> Advice:
    return Advice(
        path,
        record,
        _read_table(path / "predictions.csv", required=()),
        _read_table(path / "checks.csv", required=(), optional=True),
        _read_profile(path, _read_record(path / "profile.yaml")) if (path / "profile.yaml").is_file() else None,
    )


_READERS: dict[str, Callable[[Path, dict[str, Any]], Folder]] = {
    "run.yaml": _read_run,
    "compare.yaml": _read_comparison,
    "sweep.yaml": _read_sweep,
    "advice.yaml": _read_advice,  # before the profile, which an advice's folder may contain too
    "profile.yaml": _read_profile,
}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: must map names to values, as the commands write it")
    return record


def _read_columns(path: Path, columns: Sequence[Column]) -> pd.DataFrame:
    needed = [column for column in columns if column.needed]
    numbers = {column.name: column.may_be_empty for column in needed if column.unit}
    return _read_table(path, required=[column.name for column in needed], numbers=numbers)


def _read_table(
    path: Path,
    *,
    required: Sequence[str],
    numbers: Mapping[str, bool] = MappingProxyType({}),
    optional: bool = False,
) -> pd.DataFrame:
    """Return the CSV file at ``path`` without a last row that was cut off by a kill; an empty table if an ``optional`` file
    is missing. ``numbers`` are columns of numbers, and whether there may be none in a row. Raises :class:`InputError`."""
    if optional and not path.exists():
        return pd.DataFrame(columns=list(required))
    try:
        text = _whole_rows(path.read_bytes().decode("utf-8"))
        table = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""])
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; the folder is incomplete") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise InputError(f"{path}: cannot be read as CSV: {' '.join(str(error).split())}") from error
    for name in required:
        if name not in table:
            raise InputError(f"{path}: has no column '{name}'; needed: {', '.join(required)}")
    for name, may_be_empty in numbers.items():
        wrong = table.index[pd.to_numeric(table[name], errors="coerce").isna() & ~(table[name].isna() & may_be_empty)]
        if len(wrong):
            row = int(wrong[0])
            raise InputError(f"{path}: row {row + 1} has '{table[name].iloc[row]!s}' as {name}; a number is needed")
    return table


def _whole_rows(text: str) -> str:
    """Return ``text`` up to the end of its last complete row: one with a line end and all quotes closed."""
    while text and (not text.endswith("\n") or text.count('"') % 2):
        text = text[: text.rfind("\n", 0, len(text) - 1) + 1]
    return text
