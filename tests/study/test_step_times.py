"""The step-time model: fits that must find what the rows were made from."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from splitwiser.study.step_times import StepCosts, fit_costs, fit_non_negative, nearest_costs
from tests.support.assertions import assert_says, refusal

STEP, TOKEN, CHUNK, PAIR, LATER_PAIR = 2e-3, 1e-4, 5e-4, 2e-7, 3e-7


def prefill_row(prompts: int, start: int, tokens: int, threads: int = 1) -> dict[str, float]:
    own = tokens * (tokens + 1) / 2
    pairs = LATER_PAIR * (start * tokens + own) if start else PAIR * own
    seconds = STEP + prompts * (TOKEN * tokens + CHUNK + pairs)
    return {
        "threads": threads, "prompts": prompts, "start_tokens": start, "prompt_tokens": tokens, "ms": seconds * 1e3,
    }  # fmt: skip


def decode_row(batch: int, context: int, threads: int = 1) -> dict[str, float]:
    seconds = {1: 0.010, 4: 0.016, 16: 0.028}[batch] + 1e-6 * batch * context
    return {"threads": threads, "batch": batch, "context": context, "ms": seconds * 1e3}


PREFILL = pd.DataFrame(
    [prefill_row(1, 0, n) for n in (64, 256, 1024)]
    + [prefill_row(4, 0, n) for n in (64, 256)]
    + [prefill_row(1, 512, n) for n in (64, 256, 1024)]
)
DECODE = pd.DataFrame([decode_row(batch, context) for batch, context in product((1, 4, 16), (128, 1024))])


@pytest.fixture(scope="module")
def costs() -> StepCosts:
    return fit_costs(PREFILL, DECODE)[1]


def test_the_coefficients_that_made_the_rows_are_found(costs: StepCosts) -> None:
    assert costs.prefill_coefficients == pytest.approx((STEP, TOKEN, CHUNK, PAIR, LATER_PAIR), rel=1e-6)


def test_a_step_of_unequal_chunks_is_the_sum_of_its_parts(costs: StepCosts) -> None:
    expected = (
        STEP + 130 * TOKEN + 2 * CHUNK + PAIR * 100 * 101 / 2 + LATER_PAIR * (30 * 500 + 30 * 31 / 2)
    )  # a whole prompt of 100 and a chunk of 30 behind 500
    assert costs.prefill([(0, 100), (500, 30)]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("batch", "context", "seconds"),
    [
        (4, 4 * 128, 0.016 + 4 * 128e-6),  # a row
        (4, 4 * 500, 0.016 + 4 * 500e-6),  # between two contexts
        (10, 10 * 500, 0.022 + 10 * 500e-6),  # half-way between two batches
        (28, 28 * 500, 0.040 + 28 * 500e-6),  # beyond the largest
        (16, 16 * 5000, 0.028 + 16 * 5000e-6),  # beyond the longest
    ],
)
def test_decode_between_and_beyond_what_was_profiled(
    costs: StepCosts, batch: int, context: int, seconds: float
) -> None:
    assert costs.decode(batch, context) == pytest.approx(seconds)


def test_more_requests_never_take_less() -> None:
    rows = pd.DataFrame([{"threads": 1, "batch": b, "context": 64, "ms": ms} for b, ms in ((1, 10), (4, 20), (8, 12))])
    costs = fit_costs(PREFILL, rows)[1]
    assert costs.decode(16, 16 * 64) >= costs.decode(8, 8 * 64)


def test_noise_does_not_make_a_coefficient_negative() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        noisy = PREFILL.assign(ms=PREFILL.ms * rng.uniform(0.6, 1.4, len(PREFILL)))
        costs = fit_costs(noisy, DECODE)[1]
        assert min(costs.prefill_coefficients) >= 0
        assert costs.prefill([(0, 2000)]) >= costs.prefill([(0, 20)])


def test_the_fit_is_the_best_of_all_non_negative_ones() -> None:
    rng = np.random.default_rng(1)
    features, times = rng.uniform(0, 1, (12, 3)), rng.uniform(0.5, 2, 12)
    features[:, 2] = -features[:, 0]  # would want a negative coefficient

    def error(coefficients: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        return float((((features @ coefficients) / times - 1) ** 2).sum())

    least = error(fit_non_negative(features, times))
    grid = np.linspace(0, 3, 31)
    assert least <= min(error(np.array(each)) for each in product(grid, grid, grid)) + 1e-9


def test_each_thread_count_has_costs_of_its_own() -> None:
    both = [pd.concat([table, table.assign(threads=2, ms=table.ms / 2)]) for table in (PREFILL, DECODE)]
    costs = fit_costs(*both)
    assert costs[2].prefill([(0, 300)]) == pytest.approx(costs[1].prefill([(0, 300)]) / 2)
    assert costs[2].decode(4, 400) == pytest.approx(costs[1].decode(4, 400) / 2)
    assert [nearest_costs(costs, threads) for threads in (1, 2, 8)] == [costs[1], costs[2], costs[2]]


def test_a_profile_of_one_phase_is_refused() -> None:
    other = DECODE.assign(threads=2)
    assert_says(refusal(fit_costs, PREFILL, pd.concat([DECODE, other])), "no rows of one phase for 2 threads")


@pytest.mark.parametrize(
    ("chunk", "products"),
    [
        (300, STEP + 316 * TOKEN),  # decode tokens are as many more rows
        (50, 0.028),  # reading the weights for 16 rows takes longer than the products of 66
    ],
)
def test_a_hybrid_step_reads_the_weights_once(costs: StepCosts, chunk: int, products: float) -> None:
    attention = CHUNK + LATER_PAIR * (chunk * 500 + chunk * (chunk + 1) / 2)
    expected = products + attention + 16 * 400e-6 * 1
    assert costs.hybrid([(500, chunk)], 16, 16 * 400) == pytest.approx(expected)
    assert costs.hybrid([(500, chunk)], 16, 16 * 400) < costs.prefill([(500, chunk)]) + costs.decode(16, 16 * 400)
