"""Traces of real traffic: when requests arrived and how long they were, in the CSV format of the public Azure LLM
inference traces (Patel et al., "Splitwise", ISCA 2024; https://github.com/Azure/AzurePublicDataset)."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from splitwiser.errors import InputError, first_line
from splitwiser.workload.planned import PlannedRequest
from splitwiser.workload.reports import TABLE_READERS

if TYPE_CHECKING:
    import pandas as pd  # slow to import, so at run time only where a table is read

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def parse_slice(text: str) -> tuple[float, float]:
    """Read ``START:END``, seconds from a trace's first request; either may be left out. Raises :class:`InputError`."""
    try:
        start, end = (
            float(part) if part else default for part, default in zip(text.split(":"), (0, np.inf), strict=True)
        )
    except ValueError:
        start, end = np.nan, np.nan
    if not 0 <= start < end:
        raise InputError(f"--trace_slice '{text}': must be START:END in seconds, such as 60:120, 60: or :120")
    return start, end


def read_trace(path: Path, start_s: float = 0.0, end_s: float = np.inf, speed: float = 1.0) -> list[PlannedRequest]:
    """Return the requests in ``path`` that arrived from ``start_s`` to before ``end_s`` after the first one, by arrival,
    which counts from ``start_s``, ``speed`` times as fast. Raises :class:`InputError` naming the file, the row and the
    column."""
    import pandas as pd

    try:
        table = TABLE_READERS[".csv"](path)
    except FileNotFoundError as error:
        raise InputError(f"--trace {path}: no such file") from error
    except (ValueError, OSError) as error:
        raise InputError(f"--trace {path}: cannot be read as CSV: {first_line(error)}") from error
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        given = ", ".join(map(str, table.columns))
        raise InputError(
            f"--trace {path}: no column '{missing[0]}'; needed: {', '.join(COLUMNS)}; its columns: {given}"
        )
    if table.empty:
        raise InputError(f"--trace {path}: no requests in it; at least one is needed")
    moments = pd.to_datetime(table["TIMESTAMP"], format="ISO8601", utc=True, errors="coerce")
    bare = table["TIMESTAMP"].str.fullmatch(
        r"\s*[-+]?[0-9.]+([eE][-+]?[0-9]+)?\s*"
    )  # a plain number is ambiguous: seconds, a year or a day
    _refuse_first(path, table["TIMESTAMP"], moments.isna() | bare, "a time such as 2023-11-16 18:15:46.6805900")
    prompt_tokens, output_tokens = (_token_counts(path, table[column]) for column in COLUMNS[1:])
    seconds = (moments - moments.min()).dt.total_seconds()
    kept = seconds[(seconds >= start_s) & (seconds < end_s)].sort_values(kind="stable")
    if kept.empty:
        raise InputError(
            f"--trace {path}: no requests from {start_s:g} to {end_s:g} s; it spans 0 to {seconds.max():g} s"
        )
    rows = zip(prompt_tokens[kept.index], output_tokens[kept.index], (kept - start_s) / speed, strict=True)
    return [PlannedRequest(None, int(prompt), int(output), float(arrival_s)) for prompt, output, arrival_s in rows]


def _token_counts(path: Path, cells: "pd.Series[str]") -> "pd.Series[int]":
    wrong = ~cells.str.fullmatch(r"0*[1-9][0-9]{0,8}")
    _refuse_first(path, cells, wrong, "a whole number of 1 or more")
    return cells.astype(int)


def _refuse_first(path: Path, cells: "pd.Series[str]", wrong: "pd.Series[bool]", right: str) -> None:
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise InputError(f"--trace {path}, row {row + 1}: {cells.name} must be {right}, not '{cells.iloc[row]}'")
