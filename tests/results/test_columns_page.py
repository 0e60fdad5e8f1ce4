"""The page that describes the columns of every command's files."""

import write_columns


def test_the_page_is_what_the_code_writes() -> None:
    assert write_columns.PAGE.read_text(encoding="utf-8") == write_columns.describe(), "run scripts/write_columns.py"


def test_every_column_is_described() -> None:
    described = [each for tables in write_columns.TABLES.values() for columns in tables.values() for each in columns]
    assert len(described) > 100
    assert [each.name for each in described if not each.description.endswith(".")] == []
