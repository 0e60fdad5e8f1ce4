"""Reads reports (a finding and its reference impression) from .tok sets, jsonl, csv, parquet or a ``datasets`` name."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from splitwiser.errors import InputError, first_line, unknown_name
from splitwiser.text import check_text, read_text

if TYPE_CHECKING:
    import pandas as pd  # slow to import, so at run time only where a table is read

DEFAULT_FINDING_COLUMN = "findings"
DEFAULT_IMPRESSION_COLUMN = "impression"
SPLITS = ("train", "validate", "test")


def _read_jsonl(path: Path) -> "pd.DataFrame":
    import pandas as pd

    # not pandas' reader, which turns text that looks like a number or a date into one
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            fault = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise ValueError(f"line {number}: {fault}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: must be an object, its keys the columns")
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def _read_csv(path: Path) -> "pd.DataFrame":
    import pandas as pd

    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not isinstance(table.index, pd.RangeIndex):  # pandas uses the first cells of longer rows as labels
        raise ValueError("its rows have more cells than its header; quote a text that holds commas")
    return table


def _read_parquet(path: Path) -> "pd.DataFrame":
    import pandas as pd

    return pd.read_parquet(path)


TABLE_READERS: dict[str, "Callable[[Path], pd.DataFrame]"] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


@dataclass(frozen=True)
class Report:
    """One report: the text to summarise and, where the set has one, the reference summary (else empty)."""

    finding: str
    impression: str = ""


def load_reports(
    source: str | Path,
    split: str,
    finding_column: str = DEFAULT_FINDING_COLUMN,
    impression_column: str = DEFAULT_IMPRESSION_COLUMN,
) -> list[Report]:
    """Read reports from ``source``, in its order.

    ``source`` is a directory with ``{split}.findings.tok`` and ``{split}.impression.tok`` (one report per line, the
    RadAdapt format), a ``.jsonl``, ``.csv`` or ``.parquet`` file with the two named columns (the reference may be
    missing), or the name of a ``datasets`` set on the hub or saved on disk. Raises :class:`InputError`.
    """
    path = Path(source)
    if path.is_file():
        reports = _from_table(path, finding_column, impression_column)
    elif path.is_dir() and not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        reports = load_tok(path, split)
    elif path.is_dir() or (not path.suffix and not path.is_absolute() and not str(source).startswith(".")):
        reports = _from_datasets(str(source), split, finding_column, impression_column)
    else:
        raise InputError(f"--data {source}: no such file or directory")
    if not reports:
        raise InputError(f"--data {source}: no reports in it; at least one is needed")
    return reports


def load_tok(directory: Path, split: str) -> list[Report]:
    """Read ``{split}.findings.tok`` and ``{split}.impression.tok`` of ``directory``; line i of one belongs to line i of
    the other. Raises :class:`InputError` on a missing file, differing line counts or an empty finding."""
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    paths = [directory / f"{split}.{part}.tok" for part in ("findings", "impression")]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file; a .tok set needs {paths[0].name} and {paths[1].name}")
    findings, impressions = map(_tok_lines, paths)
    if len(findings) != len(impressions):
        raise InputError(
            f"{paths[0]} has {len(findings)} lines but {paths[1].name} has {len(impressions)}; both need one report per line"
        )
    for number, finding in enumerate(findings, start=1):
        if not finding.strip():
            raise InputError(f"{paths[0]}, line {number}: empty; every line holds one report's findings")
    return [
        Report(finding.strip(), impression.strip()) for finding, impression in zip(findings, impressions, strict=True)
    ]


def _tok_lines(path: Path) -> list[str]:
    try:
        text = read_text(path)
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as utf-8 text: {first_line(error)}") from error
    # only a newline ends a report: str.splitlines would also split at form feeds and at U+2028
    return text.removesuffix("\n").split("\n") if text else []


def _from_table(path: Path, finding_column: str, impression_column: str) -> list[Report]:
    if path.suffix not in TABLE_READERS:
        raise InputError(f"--data {path}: unknown ending '{path.suffix}'; known: {', '.join(TABLE_READERS)}")
    import pandas as pd

    try:
        table = TABLE_READERS[path.suffix](path)
    except pd.errors.EmptyDataError:
        return []
    except Exception as error:  # the libraries raise many kinds
        raise InputError(f"--data {path}: cannot be read as {path.suffix[1:]}: {first_line(error)}") from error
    if table.empty:
        return []
    return _from_columns(
        str(path),
        {str(name): table[name].tolist() for name in table.columns},
        finding_column,
        impression_column,
    )


def _from_datasets(name: str, split: str, finding_column: str, impression_column: str) -> list[Report]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"--data {name}: reading it needs the 'datasets' package; pip install datasets") from error
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
            table = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            table = datasets.load_dataset(name, split=split)
    except KeyError as error:
        raise unknown_name(f"split of --data {name}", split, found) from error
    except Exception as error:  # the library raises many kinds: no such set, no network, a bad script
        raise InputError(f"--data {name}: not a file, and 'datasets' cannot load it: {first_line(error)}") from error
    wanted = [column for column in (finding_column, impression_column) if column in table.column_names]
    return _from_columns(
        name,
        {column: table[column][:] if column in wanted else [] for column in table.column_names},
        finding_column,
        impression_column,
    )


def _from_columns(
    source: str, columns: dict[str, list[object]], finding_column: str, impression_column: str
) -> list[Report]:
    for option, name in (("--finding_column", finding_column), ("--impression_column", impression_column)):
        if name not in columns and name != DEFAULT_IMPRESSION_COLUMN:
            raise InputError(f"--data {source}: {unknown_name(f'column of {option}', name, columns).cli_message}")
    findings: Sequence[object] = columns[finding_column]
    impressions: Sequence[object] = columns.get(impression_column) or [""] * len(findings)
    reports = []
    for number, (finding, impression) in enumerate(zip(findings, impressions, strict=True), start=1):
        where = f"--data {source}, row {number}: column"
        if not isinstance(finding, str) or not finding.strip():
            raise InputError(f"{where} '{finding_column}' holds no text")
        reference = impression if isinstance(impression, str) else ""
        reports.append(
            Report(
                check_text(finding, f"{where} '{finding_column}'").strip(),
                check_text(reference, f"{where} '{impression_column}'").strip(),
            )
        )
    return reports
