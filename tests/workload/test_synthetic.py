"""Drawn lengths against their distributions, and prompts of random token ids."""

import math

import numpy as np
import pytest

from splitwiser.workload.synthetic import SPELLINGS, parse_lengths, random_prompts
from tests.support.assertions import assert_says, refusal

MANY = 20_000


def draw(text: str, seed: int = 0, count: int = MANY) -> np.ndarray:
    lengths = parse_lengths("--prompt_tokens", text).draw(count, np.random.default_rng(seed))
    assert all(type(length) is int for length in lengths)
    return np.array(lengths)


def test_a_number_is_every_length() -> None:
    assert set(draw("512").tolist()) == {512}


def test_uniform_lengths_reach_both_ends_equally_often() -> None:
    counts = np.bincount(draw("uniform:3:7"), minlength=9)
    assert counts[[0, 1, 2, 8]].tolist() == [0, 0, 0, 0]
    assert ((counts[3:8] - MANY / 5) ** 2 / (MANY / 5)).sum() < 13.3  # chi-square with 4 degrees of freedom at 1%


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_mean_and_deviation_are_those_of_the_lengths(kind: str) -> None:
    lengths = draw(f"{kind}:1000:200")
    assert np.mean(lengths) == pytest.approx(1000, abs=5)
    assert np.std(lengths) == pytest.approx(200, abs=5)


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_quantiles_are_those_of_the_distribution(kind: str) -> None:
    standard = {0.025: -1.95996, 0.25: -0.67449, 0.5: 0.0, 0.75: 0.67449, 0.975: 1.95996}
    sigma = math.sqrt(math.log(1 + 0.3**2))
    for share, z in standard.items():
        expected = 1000 + 300 * z if kind == "normal" else 1000 * math.exp(sigma * z - sigma**2 / 2)
        assert np.quantile(draw(f"{kind}:1000:300"), share) == pytest.approx(expected, rel=0.02)


def test_lengths_are_at_least_one() -> None:
    assert draw("normal:2:50").min() == 1


def test_deviation_of_zero_is_the_mean() -> None:
    assert set(draw("normal:30:0", count=5)) == set(draw("lognormal:30:0", count=5)) == {30}


def test_the_seed_fixes_the_lengths() -> None:
    assert draw("lognormal:100:50", 1).tolist() == draw("lognormal:100:50", 1).tolist()
    assert draw("lognormal:100:50", 1).tolist() != draw("lognormal:100:50", 2).tolist()


@pytest.mark.parametrize(
    "text", ["", "many", "uniform", "uniform:5", "uniform:1:2:3", "zipf:1:2", "normal:a:2", ":1:2"]
)
def test_another_spelling_is_refused(text: str) -> None:
    assert (
        refusal(parse_lengths, "--output_tokens", text) == f"--output_tokens '{text}': must be {SPELLINGS}, in tokens"
    )


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("0", "a whole number of 1 or more"),
        ("1.5", "a whole number of 1 or more"),
        ("inf", "a whole number of 1 or more"),
        ("uniform:0:5", "1 <= LOW <= HIGH"),
        ("uniform:9:5", "1 <= LOW <= HIGH"),
        ("uniform:1:2.5", "1 <= LOW <= HIGH"),
        ("normal:0:1", "MEAN 1 or more and STD 0 or more"),
        ("normal:5:-1", "MEAN 1 or more and STD 0 or more"),
        ("lognormal:nan:1", "MEAN 1 or more and STD 0 or more"),
        ("lognormal:5:inf", "MEAN 1 or more and STD 0 or more"),
    ],
)
def test_figures_out_of_range_are_refused(text: str, rule: str) -> None:
    assert_says(refusal(parse_lengths, "--prompt_tokens", text), f"--prompt_tokens '{text}': must be ", rule)


def test_prompts_have_their_lengths_and_avoid_special_tokens() -> None:
    lengths = [1, 500, 3, 2000]
    prompts = random_prompts(lengths, 10, {0, 2, 9}, np.random.default_rng(0))
    assert [len(prompt) for prompt in prompts] == lengths
    assert {token for prompt in prompts for token in prompt} == {1, 3, 4, 5, 6, 7, 8}
    assert type(prompts[0][0]) is int


def test_every_token_is_as_likely() -> None:
    (prompt,) = random_prompts([MANY], 12, {0, 1}, np.random.default_rng(5))
    counts = np.bincount(prompt)[2:]
    assert ((counts - MANY / 10) ** 2 / (MANY / 10)).sum() < 21.7  # chi-square with 9 degrees of freedom at 1%


def test_the_seed_fixes_the_prompts() -> None:
    first, again, other = (random_prompts([9, 9], 1000, (), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] != first[1]
