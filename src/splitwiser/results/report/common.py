"""What the parts of the report share."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from splitwiser.results.busy import describe_busy
from splitwiser.results.report.page import Section, cell, pairs_table

MOST_ROWS = 200  # of a table of requests
MOST_LINES = 8  # in one plot


def measure(figures: Mapping[str, Any], column: str, unit: str) -> str:
    """A figure with its unit, or a dash."""
    text = cell(figures.get(column)).text
    return f"{text} {unit}".strip() if cell(figures.get(column)).numeric else text


def setting(names: Sequence[str], values: object) -> str:
    """Such as ``mode mp, max_batch 8``; the names are left out where one alone is text."""
    listed = list(values) if isinstance(values, tuple) else [values]
    if len(names) == 1 and isinstance(listed[0], str):
        return listed[0]
    return ", ".join(f"{name} {cell(value).text}" for name, value in zip(names, listed, strict=True))


def status_warnings(record: Mapping[str, Any], file: str) -> list[str]:
    """A line if ``record`` says that what it describes has not come to its end."""
    status = record.get("status", "finished")
    if status == "finished":
        return []
    error = f" ({record['error']})" if record.get("error") else ""
    meaning = "it is still going or was killed" if status == "running" else "it did not come to its end"
    return [f"{file} says '{status}'{error}: {meaning}. The page shows what had reached the files."]


def failed_warnings(rows: pd.DataFrame) -> list[str]:
    """A line if some of the runs in ``rows`` did not finish, with their errors."""
    failed = rows[rows.status != "finished"]
    if failed.empty:
        return []
    errors = list(map(str, failed["error"].dropna().unique())) if "error" in failed else []
    return [
        f"{len(failed)} of {len(rows)} runs did not finish and are in no plot: {'; '.join(errors) or 'see the table'}."
    ]


def busy_warnings(rows: pd.DataFrame, by: str) -> list[str]:
    """A line if the machine was busy in some of the runs in ``rows``, which it names by their column ``by``."""
    said = describe_busy(rows, by)
    return [f"{said[0].upper()}{said[1:]}: these figures are not the machine's own."] if said else []


def record_section(record: Mapping[str, Any], name: str, file: str) -> Section:
    """The whole record, as the last section of a part."""
    return Section(
        "Configuration, machine and versions",
        [pairs_table(name, f"{file}, whole.", dict(flat(record)))],
        closed=True,
    )


def flat(value: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by dotted names."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else value
