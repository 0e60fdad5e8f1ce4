"""Worked examples of every figure of ``latency.csv`` and ``throughput.csv``."""

import random
from typing import Any

import numpy as np
import pytest

from splitwiser.request import RequestOutput
from splitwiser.results.goodput import parse_goodput
from splitwiser.results.metrics import latency_row, meets
from splitwiser.results.schema import LATENCY, names, throughput_figures
from tests.support.assertions import assert_says, refusal
from tests.support.records import START_NS, make_output

# arrives at 100 ms, waits 50 ms, is decoded from 215 ms on, tokens at 200, 230, 240 and 300 ms: gaps of 30, 10 and 60 ms
WORKED = make_output(
    4, arrival=100, prefill=150, decode=215, tokens=(200, 230, 240, 300), prompt_tokens=7, text="a b", reason="stop"
)
SINGLE = make_output(5, arrival=40, prefill=60, tokens=(90,), prompt_tokens=2)
STATISTICS = ("mean", "median", "std", "p90", "p99")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("request_id", 4),
        ("prompt_tokens", 7),
        ("output_tokens", 4),
        ("priority", 0),
        ("arrival_s", 0.1),
        ("prefill_start_s", 0.15),
        ("first_token_s", 0.2),
        ("finish_s", 0.3),
        ("queue_ms", 50),
        ("ttft_ms", 100),
        ("handoff_ms", 15),
        ("tpot_ms", 100 / 3),
        ("itl_p50_ms", 30),
        ("itl_p99_ms", 30 + 0.98 * 30),  # between the second and the third of three gaps
        ("e2el_ms", 200),
        ("finish_reason", "stop"),
        ("prefill_worker", "prefill-0"),
        ("decode_worker", "decode-1"),
    ],
)
def test_latency_column_of_a_worked_request(column: str, value: Any) -> None:
    found = latency_row(WORKED, START_NS)[column]
    assert found == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("output", [WORKED, SINGLE], ids=["several tokens", "one token"])
def test_latency_row_has_every_column_in_order(output: Any) -> None:
    assert tuple(latency_row(output, START_NS)) == names(LATENCY)


def test_one_token_has_no_figures_between_tokens() -> None:
    row = latency_row(SINGLE, START_NS)
    assert {column for column, value in row.items() if value is None} == {
        "adapter",
        "handoff_ms",
        "tpot_ms",
        "itl_p50_ms",
        "itl_p99_ms",
    }


def test_one_token_ends_when_it_comes() -> None:
    row = latency_row(SINGLE, START_NS)
    assert (row["first_token_s"], row["ttft_ms"]) == (row["finish_s"], row["e2el_ms"])


# WORKED and SINGLE: the last token at 300 ms, 9 prompt tokens, 5 output tokens
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("duration", 0.3),
        ("completed", 2),
        ("failed", 3),
        ("total_input_tokens", 9),
        ("total_output_tokens", 5),
        ("request_throughput", 2 / 0.3),
        ("output_throughput", 5 / 0.3),
        ("total_token_throughput", 14 / 0.3),
        ("mean_ttft_ms", 75.0),
        ("median_ttft_ms", 75.0),
        ("std_ttft_ms", 25.0),
        ("p90_ttft_ms", 95.0),
        ("p99_ttft_ms", 99.5),
        ("mean_tpot_ms", 100 / 3),
        ("median_tpot_ms", 100 / 3),
        ("std_tpot_ms", 0.0),
        ("p90_tpot_ms", 100 / 3),
        ("p99_tpot_ms", 100 / 3),
        ("mean_itl_ms", 100 / 3),
        ("median_itl_ms", 30.0),
        ("std_itl_ms", ((10**2 + 70**2 + 80**2) / 3 / 9) ** 0.5),  # 30, 10 and 60 less 100/3
        ("p90_itl_ms", 54.0),
        ("p99_itl_ms", 59.4),
        ("mean_e2el_ms", 125.0),
        ("median_e2el_ms", 125.0),
        ("std_e2el_ms", 75.0),
        ("p90_e2el_ms", 185.0),
        ("p99_e2el_ms", 198.5),
        ("mean_handoff_ms", 15.0),
        ("std_handoff_ms", 0.0),
        ("p99_handoff_ms", 15.0),
    ],
)
def test_throughput_column_of_two_worked_requests(column: str, value: float) -> None:
    assert throughput_figures([WORKED, SINGLE], 3, START_NS)[column] == pytest.approx(value)


def test_throughput_columns_are_those_documented() -> None:
    counts = [
        "duration", "completed", "failed", "cancelled", "total_input_tokens", "total_output_tokens", "request_throughput",
        "request_goodput", "requests_in_flight", "full_batch_itl_ms", "output_throughput", "total_token_throughput",
    ]  # fmt: skip
    metrics = ("ttft", "tpot", "itl", "e2el", "handoff")
    statistics = [f"{statistic}_{metric}_ms" for metric in metrics for statistic in STATISTICS]
    assert list(throughput_figures([WORKED], 0, START_NS)) == counts + statistics


def test_requests_in_flight_are_those_between_their_first_and_last_token() -> None:
    outputs = [
        make_output(0, tokens=(100, 500, 900)),
        make_output(1, tokens=(200, 400)),
        make_output(2, tokens=(1000,)),
    ]
    assert throughput_figures(outputs, 0, START_NS)["requests_in_flight"] == pytest.approx(
        1.0
    )  # 800 and 200 of 1,000 ms


def test_the_full_batch_is_the_time_in_which_every_request_generates() -> None:
    outputs = [make_output(0, tokens=(100, 190, 210, 240, 270)), make_output(1, tokens=(200, 230, 250, 900))]
    # from 200 to 270 ms: gaps of 30 and 30 of the first, 30 and 20 of the second
    assert throughput_figures(outputs, 0, START_NS)["full_batch_itl_ms"] == pytest.approx(30)
    apart = [make_output(0, tokens=(100, 110)), make_output(1, tokens=(200, 210))]
    assert throughput_figures(apart, 0, START_NS)["full_batch_itl_ms"] is None


def test_duration_counts_from_the_start_and_not_from_the_first_arrival() -> None:
    assert throughput_figures([make_output(arrival=500, tokens=(800,))], 0, START_NS)["duration"] == pytest.approx(0.8)


def test_duration_ends_with_the_last_token_of_any_request() -> None:
    outputs = [make_output(0, tokens=(100, 900)), make_output(1, tokens=(200, 300))]
    assert throughput_figures(outputs, 0, START_NS)["duration"] == pytest.approx(0.9)


def test_no_requests_leave_counts_of_zero_and_figures_of_none() -> None:
    figures = throughput_figures([], 2, START_NS)
    counts = {
        "duration": 0,
        "completed": 0,
        "failed": 2,
        "cancelled": 0,
        "total_input_tokens": 0,
        "total_output_tokens": 0,
    }
    assert figures == {column: counts.get(column) for column in figures}


def test_requests_of_one_token_have_no_figures_between_tokens() -> None:
    figures = throughput_figures([SINGLE, SINGLE], 0, START_NS)
    empty = {column for column, value in figures.items() if value is None}
    missing = {f"{statistic}_{metric}_ms" for metric in ("tpot", "itl", "handoff") for statistic in STATISTICS}
    assert empty == missing | {"request_goodput", "full_batch_itl_ms"}


# one that had two tokens, and one that had none
CANCELLED = (
    make_output(6, arrival=100, prefill=150, decode=215, tokens=(200, 250), cancelled=280),
    make_output(7, arrival=100, tokens=(), cancelled=400),
)


def test_cancelled_requests_count_as_far_as_they_came() -> None:
    figures = throughput_figures([WORKED, *CANCELLED], 0, START_NS, {"ttft": 1000.0})
    alone = throughput_figures([WORKED], 0, START_NS, {"ttft": 1000.0})
    changed = {name: value for name, value in figures.items() if value != pytest.approx(alone[name])}
    assert {name: changed[name] for name in changed if "_itl_" not in name and "_tpot_" not in name} == {
        "cancelled": 2,
        "total_output_tokens": 6,
        "requests_in_flight": pytest.approx(0.5),
        "output_throughput": 6 / 0.3,
        "total_token_throughput": 13 / 0.3,
    }
    assert changed["mean_itl_ms"] == (30 + 10 + 60 + 50) / 4
    assert (figures["completed"], figures["request_goodput"]) == (1, 1 / 0.3)


@pytest.mark.parametrize(
    ("output", "finish_s", "empty"),
    [
        (CANCELLED[0], 0.28, {"adapter", "e2el_ms"}),
        (
            CANCELLED[1],
            0.4,
            {"adapter", "prefill_start_s", "first_token_s", "queue_ms", "ttft_ms", "handoff_ms", "tpot_ms", "itl_p50_ms",
             "itl_p99_ms", "e2el_ms"},
        ),
    ],
)  # fmt: skip
def test_the_row_of_a_cancelled_request(output: RequestOutput, finish_s: float, empty: set[str]) -> None:
    row = latency_row(output, START_NS)
    assert row["finish_s"] == pytest.approx(finish_s)
    assert row["finish_reason"] == "cancelled"
    assert {column for column, value in row.items() if value is None} == empty


def random_times(seed: int) -> list[list[int]]:
    """Times of the tokens of 40 requests that arrive at 0, in milliseconds; some have one token."""
    rng = random.Random(seed)
    return [np.cumsum([rng.randrange(1, 90) for _ in range(rng.randrange(1, 30))]).tolist() for _ in range(40)]


def test_no_gap_spans_two_requests() -> None:
    outputs = [make_output(0, tokens=(10, 20)), make_output(1, tokens=(5010, 5020))]
    assert throughput_figures(outputs, 0, START_NS)["p99_itl_ms"] == pytest.approx(10)


def test_figures_do_not_depend_on_the_order_of_the_outputs() -> None:
    outputs = [make_output(number, tokens=times) for number, times in enumerate(random_times(1))]
    assert throughput_figures(outputs, 0, START_NS) == pytest.approx(throughput_figures(outputs[::-1], 0, START_NS))


# goodput. WORKED: TTFT 100 ms, TPOT 100 / 3 ms, E2E 200 ms. SINGLE: TTFT and E2E 50 ms, no TPOT


@pytest.mark.parametrize(
    ("targets", "good"),
    [
        ({"ttft": 100}, True),  # a figure equal to its target meets it
        ({"ttft": 99.9}, False),
        ({"tpot": 33.4}, True),
        ({"tpot": 33.3}, False),
        ({"e2el": 200}, True),
        ({"e2el": 199}, False),
        ({"ttft": 100, "tpot": 34, "e2el": 200}, True),
        ({"ttft": 100, "tpot": 34, "e2el": 199}, False),
        ({"ttft": 99, "tpot": 34, "e2el": 200}, False),
        ({"ttft": 100, "tpot": 33, "e2el": 200}, False),
    ],
)
def test_a_request_is_good_if_it_meets_every_target(targets: dict[str, float], good: bool) -> None:
    assert meets(WORKED.metrics, targets) is good


def test_a_request_of_one_token_has_a_time_per_token_of_zero_for_goodput() -> None:
    assert meets(SINGLE.metrics, {"tpot": 0})
    assert not meets(SINGLE.metrics, {"tpot": 0, "ttft": 49})


@pytest.mark.parametrize(
    ("targets", "good"), [({"ttft": 100}, 2), ({"ttft": 60}, 1), ({"ttft": 10}, 0), ({"ttft": 60, "e2el": 40}, 0)]
)
def test_goodput_is_good_requests_per_second_of_the_run(targets: dict[str, float], good: int) -> None:
    figures = throughput_figures([WORKED, SINGLE], 3, START_NS, targets)
    assert figures["request_goodput"] == pytest.approx(good / 0.3)
    assert figures["request_throughput"] == pytest.approx(2 / 0.3)


def test_goodput_is_that_of_numpy_over_all_requests() -> None:
    times = random_times(6)
    outputs = [make_output(tokens=each) for each in times]
    ttft, e2el = (np.array([each[end] for each in times]) for end in (0, -1))
    tpot = np.array([(each[-1] - each[0]) / max(1, len(each) - 1) for each in times])
    good = np.sum((ttft <= 60) & (tpot <= 45) & (e2el <= 900))
    assert 0 < good < len(times)
    figures = throughput_figures(outputs, 0, START_NS, {"ttft": 60, "tpot": 45, "e2el": 900})
    assert figures["request_goodput"] == pytest.approx(good / (max(e2el) / 1000))


def test_no_targets_no_goodput() -> None:
    assert throughput_figures([WORKED], 0, START_NS)["request_goodput"] is None


@pytest.mark.parametrize(
    "text", ["ttft:200,tpot:50.5,e2el:5e3", "ttft:200 tpot:50.5 e2el:5e3", "e2el:5000, tpot:50.5, ttft:200"]
)
def test_targets_may_be_parted_by_commas_or_spaces(text: str) -> None:
    assert parse_goodput(text) == {"ttft": 200, "tpot": 50.5, "e2el": 5000}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["needs at least one target"]),
        ("ttfs:200", ["unknown target of --goodput 'ttfs'", "ttft"]),
        ("ttft", ["such as tpot:50"]),
        ("tpot=50", ["such as tpot:50"]),
        ("ttft<200, tpot:50", ["such as ttft:200"]),
        ("ttft:fast", ["ttft must be 0 or more milliseconds"]),
        ("ttft:200,tpot:-1", ["tpot must be 0 or more milliseconds"]),
        ("e2el:nan", ["e2el must be 0 or more milliseconds"]),
        ("ttft:1,ttft:2", ["ttft is given twice"]),
    ],
)
def test_wrong_targets_are_refused(text: str, parts: list[str]) -> None:
    assert_says(refusal(parse_goodput, text), "--goodput", *parts)
