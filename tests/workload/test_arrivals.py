"""When requests arrive: drawn times against their distributions, and who is due when."""

import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from splitwiser.engine.arrivals import Arrivals
from splitwiser.request import Request, SamplingParams
from splitwiser.workload.arrivals import gamma_arrivals
from tests.support.assertions import assert_says, refusal

MANY = 20_000


def gaps(burstiness: float, seed: int = 0, rate: float = 5.0) -> np.ndarray:
    """The gaps of many arrivals, the one before the first too, in units of their mean."""
    times = gamma_arrivals(MANY, rate, burstiness, np.random.default_rng(seed))
    return np.diff([0.0, *times]) * rate


def gamma_of_half(x: float) -> float:
    """Cumulative distribution of a gamma variable of shape 1/2 and mean 1."""
    return math.erf(math.sqrt(x / 2))


def exponential(x: float) -> float:
    return 1 - math.exp(-x)


def erlang_of_four(x: float) -> float:
    """Of shape 4 and mean 1."""
    return 1 - math.exp(-4 * x) * sum((4 * x) ** k / math.factorial(k) for k in range(4))


@pytest.mark.parametrize(
    ("burstiness", "cumulative"), [(0.5, gamma_of_half), (1.0, exponential), (4.0, erlang_of_four)]
)
def test_gaps_follow_the_gamma_distribution(burstiness: float, cumulative: Callable[[float], float]) -> None:
    expected = np.array([cumulative(gap) for gap in np.sort(gaps(burstiness))])
    ranks = np.arange(MANY + 1) / MANY
    distance = max(np.abs(expected - ranks[1:]).max(), np.abs(expected - ranks[:-1]).max())
    assert distance < 1.63 / MANY**0.5  # Kolmogorov-Smirnov at 1%


@pytest.mark.parametrize("burstiness", [0.1, 0.5, 1.0, 4.0, 100.0])
def test_burstiness_sets_the_coefficient_of_variation(burstiness: float) -> None:
    found = gaps(burstiness)
    assert np.std(found) / np.mean(found) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_poisson_counts_have_their_mean_for_variance_and_no_memory() -> None:
    times = gamma_arrivals(MANY, 10.0, 1.0, np.random.default_rng(1))
    counts = np.bincount(np.array(times).astype(int), minlength=2000)[:2000]  # in windows of a second
    assert np.var(counts) / np.mean(counts) == pytest.approx(1, abs=0.1)
    assert abs(np.corrcoef(counts[:-1], counts[1:])[0, 1]) < 0.07


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("count", [1, 7])
def test_the_rate_is_kept_exactly_whatever_the_seed(count: int, burstiness: float) -> None:
    for seed in range(5):
        times = gamma_arrivals(count, 4.0, burstiness, np.random.default_rng(seed))
        assert len(times) == count
        assert times == sorted(times)
        assert times[0] > 0
        assert times[-1] == pytest.approx(count / 4)


def test_infinite_burstiness_is_a_metronome() -> None:
    times = gamma_arrivals(4, 2.0, math.inf, np.random.default_rng(0))
    assert times == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_infinite_rate_is_all_at_once() -> None:
    assert gamma_arrivals(3, math.inf, 1.0, np.random.default_rng(0)) == [0.0, 0.0, 0.0]


def test_the_seed_fixes_the_times() -> None:
    first, again, other = (gamma_arrivals(50, 1.0, 1.0, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("burstiness", [1e-300, 5e-324])
def test_burstiness_that_cannot_be_drawn_from_is_refused(burstiness: float) -> None:
    message = refusal(gamma_arrivals, 3, 1.0, burstiness, np.random.default_rng(0))
    assert_says(message, f"--burstiness {burstiness:g}", "give a larger value")


# who is due


def request(number: int, arrival_s: float = 0.0) -> Request:
    return Request(number, (5,), SamplingParams(), seed=0, arrival_s=arrival_s)


def ids(arrivals: Arrivals) -> list[int]:
    return [each.request_id for each, _ in arrivals.due()]


@pytest.mark.parametrize("removed", range(5))
def test_the_others_keep_their_times_when_one_is_removed(removed: int) -> None:
    arrivals = Arrivals([request(number, (7 * number) % 5) for number in range(5)], 0, clock=lambda: 10**10)
    next(arrivals.due())  # of request 0
    found = arrivals.remove(removed)
    assert (found and found.request_id) == (removed or None)
    assert [(each.request_id, moment / 10**9) for each, moment in arrivals.due()] == [
        (number, seconds) for number, seconds in ((3, 1), (1, 2), (4, 3), (2, 4)) if number != removed
    ]


def test_open_loop_keeps_arrival_times_however_late_it_is_asked() -> None:
    long_ago = time.perf_counter_ns() - 10**10
    arrivals = Arrivals([request(0, 2.0), request(1, 0.5), request(2, 3600.0)], long_ago)
    assert arrivals.next_ns == long_ago + 500_000_000
    assert [(each.request_id, moment - long_ago) for each, moment in arrivals.due()] == [
        (1, 500_000_000),
        (0, 2_000_000_000),
    ]
    assert arrivals.request_ids == [2]
    assert arrivals.next_ns == long_ago + 3_600_000_000_000


def test_open_loop_does_not_wait_for_answers() -> None:
    arrivals = Arrivals([request(number) for number in range(5)], 0)
    assert ids(arrivals) == [0, 1, 2, 3, 4]


def test_open_loop_lets_nobody_arrive_sooner_for_an_answer() -> None:
    arrivals = Arrivals([request(0), request(1, arrival_s=3600.0)], 0, clock=lambda: 1_000)
    assert ids(arrivals) == [0]
    arrivals.record_finish(900)
    assert ids(arrivals) == []
    assert arrivals.next_ns == 3_600_000_000_000


def test_closed_loop_lets_the_next_arrive_the_moment_one_finishes() -> None:
    arrivals = Arrivals([request(number, arrival_s=3600.0) for number in range(5)], 100, max_concurrency=2)
    assert [(each.request_id, moment) for each, moment in arrivals.due()] == [(0, 100), (1, 100)]
    assert arrivals.next_ns is None
    assert arrivals.request_ids == [2, 3, 4]
    arrivals.record_finish(900)
    arrivals.record_finish(700)
    assert [(each.request_id, moment) for each, moment in arrivals.due()] == [(2, 700), (3, 900)]
    arrivals.record_finish(1000)
    assert [(each.request_id, moment) for each, moment in arrivals.due()] == [(4, 1000)]
    arrivals.record_finish(1100)
    assert arrivals.next_ns is None


def test_closed_loop_with_fewer_requests_than_places() -> None:
    arrivals = Arrivals([request(0)], 0, max_concurrency=8)
    assert ids(arrivals) == [0]
    assert arrivals.next_ns is None
