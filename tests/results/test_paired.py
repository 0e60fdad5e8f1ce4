"""The arithmetic of a comparison, against hand-worked cases and numpy."""

import math

import numpy as np
import pandas as pd
import pytest

from splitwiser.results.busy import describe_busy
from splitwiser.results.paired import (
    SummaryRow,
    TokenDifference,
    compare_tokens,
    decide,
    headline_metrics,
    interval,
    round_ratios,
    summarise,
)
from splitwiser.results.schema import shown_in


def series(**values: float) -> pd.Series:
    return pd.Series({int(name[1:]): value for name, value in values.items()})


def test_ratios_pair_the_rounds_that_both_have() -> None:
    assert round_ratios(series(r1=2, r2=9, r4=6), series(r2=3, r3=5, r4=12)) == {2: 3.0, 4: 0.5}


def test_a_zero_has_no_ratio() -> None:
    assert round_ratios(series(r1=0, r2=4), series(r1=3, r2=0)) == {}


def by_round(ratios: list[float]) -> dict[int, float]:
    return dict(enumerate(ratios, start=1))


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([], None),
        ([1.5], "undecided (one round)"),
        ([1.0, 1.0], "equal"),
        ([1 + 2e-16, 1 + 2e-16], "equal"),  # sums of the same numbers in another order
        ([1.2, 1.2, 1.2], "better"),
        # logarithms -x, 0, x have mean 0; s is 0.693, and 4.303 * 0.693 / sqrt 3 = 1.722
        ([0.5, 1.0, 2.0], "undecided (from 0.18 to 5.59)"),
        # all above 1, but the scatter is as large as the difference: ln 1.1, 1.2, 1.9 have mean 0.306, s 0.294, and
        # 4.303 * 0.294 / sqrt 3 = 0.730
        ([1.1, 1.2, 1.9], "undecided (from 0.66 to 2.82)"),
        # ln 1.5, 1.6, 1.7: mean 0.469, s 0.0626, half width 0.156
        ([1.5, 1.6, 1.7], "better"),
        ([1 / 1.5, 1 / 1.6, 1 / 1.7], "worse"),
        # +-0.5%: half width 4.303 * 0.005 / sqrt 3 = 1.24%
        ([0.995, 1.0, 1.005], "equal within 2%"),
        # +-1.5%: 3.7%, more than is called equal
        ([0.985, 1.0, 1.015], "undecided (from 0.96 to 1.04)"),
    ],
)
def test_what_the_rounds_decide(ratios: list[float], expected: str | None) -> None:
    assert decide("output_throughput", by_round(ratios)) == expected


def test_of_times_and_memory_less_is_better() -> None:
    assert {metric.name for metric in shown_in("compare") if metric.more_is_better} == {
        "output_throughput", "total_token_throughput", "request_goodput", "rouge1", "rouge2", "rougeL",
    }  # fmt: skip
    assert decide("p99_itl_ms", by_round([1.5, 1.6, 1.7])) == "worse"


@pytest.mark.parametrize("ratios", [[44.7], [1.0, 1.0], [1.5, 1.6, 1.7], [0.5, 1.0, 2.0]])
def test_a_busy_machine_leaves_everything_undecided(ratios: list[float]) -> None:
    expected = f"undecided (busy machine in 1 of {len(ratios)} rounds)"
    assert decide("output_throughput", by_round(ratios), {1, 9}) == expected


@pytest.mark.parametrize("metric", ["peak_memory_mb", "rougeL"])
def test_a_busy_machine_does_not_change_memory_or_quality(metric: str) -> None:
    assert decide(metric, by_round([1.0, 1.0]), {1}) == "equal"


def test_a_busy_round_of_either_side_is_one_of_the_pair() -> None:
    rows = pd.DataFrame(
        [(number, name, "finished", value, (number, name) in {(2, "a"), (1, "c")})
         for number in (1, 2, 3) for name, value in (("a", 10.0), ("b", 20.0), ("c", 10.0))],
        columns=["round", "variant", "status", "output_throughput", "machine_busy"],
    ).assign(others_cores=1.6, cores=2.0)  # fmt: skip
    verdicts = {row.variant: row.verdict for row in summarise(rows, ["a", "b", "c"])}
    assert verdicts == {
        "a": None, "b": "undecided (busy machine in 1 of 3 rounds)", "c": "undecided (busy machine in 2 of 3 rounds)",
    }  # fmt: skip
    assert describe_busy(rows, "variant") == (
        "the machine was busy in 2 of 9 runs: variant c in round 1, variant a in round 2; other processes used up to "
        "1.6 of 2 cores"
    )
    assert describe_busy(rows.assign(machine_busy=True), "variant") == (
        "the machine was busy in all 9 runs; other processes used up to 1.6 of 2 cores"
    )
    assert describe_busy(rows.assign(machine_busy=np.nan), "variant") is None
    assert describe_busy(rows.drop(columns="machine_busy"), "variant") is None


def leaves_out_one(ratios: list[float]) -> bool:
    low, high = interval(ratios) or (0.0, 2.0)
    return low > 1 or high < 1


@pytest.mark.parametrize("rounds", [2, 3, 4, 5, 6, 11])
def test_equal_pairs_look_different_as_often_as_the_rule_says(rounds: int) -> None:
    draws = np.exp(np.random.default_rng(0).normal(0, 0.05, (4000, rounds)))
    found = np.mean([leaves_out_one(list(row)) for row in draws])
    assert found == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(("rounds", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228), (31, 2.042)])
def test_the_interval_is_students(rounds: int, quantile: float) -> None:
    logarithms = np.linspace(-0.1, 0.1, rounds)
    low, high = interval(list(np.exp(logarithms))) or (0.0, 0.0)
    half_width = quantile * np.std(logarithms, ddof=1) / math.sqrt(rounds)  # quantiles as tables print them
    assert (math.log(low), math.log(high)) == pytest.approx((-half_width, half_width), rel=1e-3)


def comparison() -> pd.DataFrame:
    rows = [
        (1, "a", "finished", 10.0, 4.0), (1, "b", "finished", 20.0, np.nan), (1, "c", "failed", np.nan, np.nan),
        (2, "b", "finished", 33.0, np.nan), (2, "c", "finished", 5.0, np.nan), (2, "a", "finished", 11.0, 6.0),
        (3, "c", "finished", 4.0, np.nan), (3, "a", "failed", 99.0, 99.0), (3, "b", "finished", 70.0, np.nan),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["round", "variant", "status", "output_throughput", "median_itl_ms"])


def test_summary() -> None:
    scattered = interval([2.0, 3.0])
    assert scattered is not None
    assert summarise(comparison(), ["a", "b", "c"]) == [
        SummaryRow("output_throughput", "a", 2, 10.5, 10.0, 11.0, *[None] * 6),
        # ratios 2 and 3; ln 2 and ln 3: mean 0.896, s 0.287, half width 2.58
        SummaryRow(
            "output_throughput", "b", 3, 33.0, 20.0, 70.0, 2.5, 2.0, 3.0, *scattered, "undecided (from 0.19 to 32.20)"
        ),
        SummaryRow(
            "output_throughput", "c", 2, 4.5, 4.0, 5.0, 5 / 11, 5 / 11, 5 / 11, None, None, "undecided (one round)"
        ),
        SummaryRow("median_itl_ms", "a", 2, 5.0, 4.0, 6.0, *[None] * 6),
        SummaryRow("median_itl_ms", "b", 0, *[None] * 9),
        SummaryRow("median_itl_ms", "c", 0, *[None] * 9),
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
    assert headline_metrics(columns) == ["request_goodput", "output_throughput", "rougeL", "ready_s"]


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
