"""Writes docs/columns.md: every column of the CSV files of each command, from where the columns are declared.

python scripts/write_columns.py
"""

from collections.abc import Mapping, Sequence

from splitwiser import constants
from splitwiser.results import schema
from splitwiser.study import advise, compare, profile, sweep

PAGE = constants.DIR_PROJECT / "docs" / "columns.md"
TABLES: dict[str, Mapping[str, Sequence[schema.Column]]] = {
    "run": schema.TABLES,
    "compare": compare.TABLES,
    "sweep": sweep.TABLES,
    "profile": profile.TABLES,
    "advise": advise.TABLES,
}


def describe() -> str:
    """Return the page in Markdown."""
    parts = [
        "# Columns of the CSV files\n",
        "Written by `scripts/write_columns.py` from the code that writes the files.\n",
    ]
    for command, tables in TABLES.items():
        parts += [f"## splitwiser {command}\n", schema.describe_columns(tables)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(describe(), encoding="utf-8")
