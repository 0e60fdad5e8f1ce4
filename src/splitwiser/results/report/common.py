"""Helpers that the parts of the report share."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from splitwiser.results.busy import describe_busy
from splitwiser.results.report.page import NOTHING, Section, cell, pairs_table

MOST_ROWS = 200  # of a table of requests
MOST_LINES = 8  # in one plot


def measure(figures: Mapping[str, Any], column: str, unit: str) -> str:
    """Return a value with its unit, or a dash."""
    text = cell(figures.get(column)).text
    return f"{text} {unit}".strip() if cell(figures.get(column)).numeric else text


def setting(names: Sequence[str], values: object) -> str:
    """Return text such as ``mode mp, max batch 8``, without missing values; the only value, if it is text, is returned
    without its name. ``values`` is a tuple, or the value of a single name."""
    listed = list(values) if isinstance(values, tuple) else [values]
    if len(names) == 1 and isinstance(listed[0], str):
        return listed[0]
    told = {name: cell(value).text for name, value in zip(names, listed, strict=True)}
    return ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in told.items() if text not in ("", NOTHING))


def status_warnings(record: Mapping[str, Any], file: str) -> list[str]:
    """Return a warning if ``record`` says that its command has not finished."""
    status = record.get("status", "finished")
    if status == "finished":
        return []
    error = f" ({record['error']})" if record.get("error") else ""
    meaning = "it is still running or was killed" if status == "running" else "it did not finish"
    return [f"{file} says '{status}'{error}: {meaning}. The page shows what the files contain so far."]


def failed_warnings(rows: pd.DataFrame) -> list[str]:
    """Return a warning with the errors if some of the runs in ``rows`` did not finish."""
    failed = rows[rows.status != "finished"]
    if failed.empty:
        return []
    errors = list(map(str, failed["error"].dropna().unique())) if "error" in failed else []
    return [
        f"{len(failed)} of {len(rows)} runs did not finish and are in no plot: {'; '.join(errors) or 'see the table'}."
    ]


def busy_warnings(rows: pd.DataFrame, by: str) -> list[str]:
    """Return a warning if the machine was busy during some of the runs in ``rows``, named by column ``by``."""
    said = describe_busy(rows, by)
    return [f"{said[0].upper()}{said[1:]}: the figures of these runs are disturbed."] if said else []


def record_section(record: Mapping[str, Any], name: str, file: str) -> Section:
    """Return the section that shows the whole record, the last one of a part."""
    told = {key: value for key, value in flat(record) if value not in (None, "")}
    return Section(
        "Configuration, machine and versions", [pairs_table(name, f"Everything in {file}.", told)], closed=True
    )


def flat(value: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings by dotted names."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else value
