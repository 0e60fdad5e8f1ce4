"""The arithmetic of a comparison, against hand-worked cases and numpy."""

import math

import numpy as np
import pandas as pd
import pytest

from splitwiser.paired import (
    METRICS,
    T_975,
    SummaryRow,
    TokenDifference,
    compare_tokens,
    headline_metrics,
    round_ratios,
    summarise,
    within_noise,
)


def series(**values: float) -> pd.Series:
    return pd.Series({int(name[1:]): value for name, value in values.items()})


def test_ratios_pair_the_rounds_that_both_have() -> None:
    assert round_ratios(series(r1=2, r2=9, r4=6), series(r2=3, r3=5, r4=12)) == [3.0, 0.5]


def test_a_zero_has_no_ratio() -> None:
    assert round_ratios(series(r1=0, r2=4), series(r1=3, r2=0)) == []


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([], None),
        ([1.5], None),
        ([1.0, 1.0], True),
        ([1.2, 1.2, 1.2], False),
        # logarithms -x, 0, x have mean 0
        ([0.5, 1.0, 2.0], True),
        # all above 1, but the scatter is as large as the difference: ln 1.1, 1.2, 1.9 have mean 0.306, s 0.294, and
        # 4.303 * 0.294 / sqrt 3 = 0.730
        ([1.1, 1.2, 1.9], True),
        # ln 1.5, 1.6, 1.7: mean 0.469, s 0.0626, half width 0.156
        ([1.5, 1.6, 1.7], False),
        ([1 / 1.5, 1 / 1.6, 1 / 1.7], False),
    ],
)
def test_noise(ratios: list[float], expected: bool | None) -> None:
    assert within_noise(ratios) is expected


@pytest.mark.parametrize("rounds", [2, 3, 4, 5, 6, 11])
def test_equal_pairs_look_different_as_often_as_the_rule_says(rounds: int) -> None:
    draws = np.exp(np.random.default_rng(0).normal(0, 0.05, (4000, rounds)))
    found = np.mean([within_noise(list(row)) is False for row in draws])
    assert found == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("freedom", range(1, len(T_975) + 1))
def test_students_t_leaves_out_a_twentieth(freedom: int) -> None:
    inside = np.linspace(-T_975[freedom - 1], T_975[freedom - 1], 100_001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = scale * (1 + inside**2 / freedom) ** (-(freedom + 1) / 2)
    assert np.trapezoid(density, inside) == pytest.approx(0.95, abs=1e-4)


def comparison() -> pd.DataFrame:
    rows = [
        (1, "a", "finished", 10.0, 4.0), (1, "b", "finished", 20.0, np.nan), (1, "c", "failed", np.nan, np.nan),
        (2, "b", "finished", 33.0, np.nan), (2, "c", "finished", 5.0, np.nan), (2, "a", "finished", 11.0, 6.0),
        (3, "c", "finished", 4.0, np.nan), (3, "a", "failed", 99.0, 99.0), (3, "b", "finished", 70.0, np.nan),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["round", "variant", "status", "output_throughput", "median_itl_ms"])


def test_summary() -> None:
    assert summarise(comparison(), ["a", "b", "c"]) == [
        SummaryRow("output_throughput", "a", 2, 10.5, 10.0, 11.0, None, None, None, None),
        # ratios 2 and 3; ln 2 and ln 3: mean 0.896, s 0.287, half width 2.58
        SummaryRow("output_throughput", "b", 3, 33.0, 20.0, 70.0, 2.5, 2.0, 3.0, True),
        SummaryRow("output_throughput", "c", 2, 4.5, 4.0, 5.0, 5 / 11, 5 / 11, 5 / 11, None),
        SummaryRow("median_itl_ms", "a", 2, 5.0, 4.0, 6.0, None, None, None, None),
        SummaryRow("median_itl_ms", "b", 0, None, None, None, None, None, None, None),
        SummaryRow("median_itl_ms", "c", 0, None, None, None, None, None, None, None),
    ]


def test_median_is_numpys() -> None:
    values = np.random.default_rng(1).normal(50, 9, 6)
    rows = pd.DataFrame({"round": range(6), "variant": "a", "status": "finished", "ready_s": values})
    (row,) = summarise(rows, ["a"])
    assert (row.median, row.least, row.greatest) == (np.median(values), values.min(), values.max())


def test_a_first_variant_that_never_finished_gives_no_ratios() -> None:
    rows = comparison()
    rows.loc[rows["variant"] == "a", "status"] = "failed"
    found = {row.variant: (row.rounds, row.ratio_median) for row in summarise(rows, ["a", "b", "c"])[:3]}
    assert found == {"a": (0, None), "b": (3, None), "c": (2, None)}


def test_metrics_are_those_that_the_runs_have() -> None:
    columns = ["round", "mode", "rougeL", "ready_s", "std_itl_ms", "output_throughput", "request_goodput"]
    assert headline_metrics(columns) == ["output_throughput", "request_goodput", "ready_s", "rougeL"]
    assert headline_metrics(METRICS) == list(METRICS)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({0: ("1 2", "5 6 7"), 1: ("3", "8")}, TokenDifference(2, 0, 0, None)),
        ({0: ("1 2", "5 9 7"), 1: ("3", "8")}, TokenDifference(2, 0, 1, 1.0)),
        # one ends early: they part where it ends
        ({0: ("1 2", "5 6"), 1: ("3", "8 8")}, TokenDifference(2, 0, 2, 1.5)),
        ({0: ("1 9", "5 6 7"), 1: ("3", "8")}, TokenDifference(2, 1, 0, None)),
        ({0: ("1 2", "5 6 7")}, TokenDifference(2, 0, 1, None)),
        ({0: ("1 2", "4 6 7"), 2: ("3", "8")}, TokenDifference(3, 0, 3, 0.0)),
    ],
)
def test_tokens_by_request(made: dict[int, tuple[str, str]], expected: TokenDifference) -> None:
    assert compare_tokens(made, {0: ("1 2", "5 6 7"), 1: ("3", "8")}) == expected
