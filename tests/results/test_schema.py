"""The list of figures and columns: whole, without contradictions, and the same as where the figures come from."""

from dataclasses import dataclass

import pytest

from splitwiser.machine import load
from splitwiser.machine.nvml import ACTIVITY_COLUMNS
from splitwiser.request import RequestMetrics
from splitwiser.results.schema import (
    DECODE,
    METRICS,
    PREFILL,
    TABLES,
    TARGETS,
    THROUGHPUT,
    Column,
    column,
    columns_of,
    describe_columns,
    names,
)
from splitwiser.study import advise, compare, profile, sweep


@dataclass
class Row:
    size: int = column("How large.", "tokens")


EVERY_TABLE = {**TABLES, **advise.TABLES, **compare.TABLES, **profile.TABLES, **sweep.TABLES}


@pytest.mark.parametrize("file", EVERY_TABLE)
def test_columns_of_a_file_are_named_once_and_described_in_a_sentence(file: str) -> None:
    columns = EVERY_TABLE[file]
    assert len(set(names(columns))) == len(columns)
    for each in columns:
        assert each.description.endswith((".", ")"))
        assert "|" not in each.description + each.unit


def test_what_the_machine_did_has_its_columns_at_the_end() -> None:
    assert names(THROUGHPUT)[-len(load.COLUMNS) :] == load.COLUMNS


@pytest.mark.parametrize("table", [PREFILL, DECODE])
def test_what_a_gpu_did_has_its_columns_at_the_end(table: tuple[Column, ...]) -> None:
    assert names(table)[-len(ACTIVITY_COLUMNS) :] == ACTIVITY_COLUMNS


def test_goodput_asks_for_what_a_request_has() -> None:
    assert all(hasattr(RequestMetrics, f"{name}_ms") for name in TARGETS)


def test_an_objective_has_one_figure() -> None:
    objectives = [metric.objective for metric in METRICS if metric.objective]
    assert sorted(objectives) == ["e2el", "goodput", "itl", "throughput", "ttft"]


def test_a_dataclass_says_what_its_columns_mean() -> None:
    assert columns_of(Row) == (Column("size", "How large.", "tokens"),)


def test_columns_are_described_in_tables() -> None:
    assert describe_columns({"a.csv": (Column("ms", "A time.", "ms"), Column("kind", "A kind."))}) == (
        "### a.csv\n\n| column | unit | meaning |\n|---|---|---|\n| `ms` | ms | A time. |\n| `kind` | - | A kind. |\n"
    )
