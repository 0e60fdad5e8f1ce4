"""CSV files that grow by a row at a time, each of which is on disk at once."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def start_rows(path: Path, columns: Sequence[str]) -> None:
    """Write a CSV of ``columns`` without a row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(columns)


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add ``row`` to the CSV at ``path`` in the order of its header; a column that the row lacks stays empty. Raises
    ValueError for a key that is no column."""
    with path.open("r+", newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
        file.seek(0, 2)
        csv.DictWriter(file, columns).writerow(row)
