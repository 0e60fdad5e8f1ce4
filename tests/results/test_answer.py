"""The sentence that answers a comparison, from rows whose verdicts are known."""

from collections.abc import Mapping, Sequence

import pandas as pd
import pytest

from splitwiser.results.answer import answer
from splitwiser.results.paired import summarise

# factors by round, on a baseline of 100: a clear difference, noise that decides nothing, and none
LESS, MORE, SCATTERED, SAME = (0.30, 0.31, 0.29), (2.2, 2.3, 2.4), (0.7, 1.1, 1.4), (1.0, 1.001, 0.999)


def said_of(variants: Mapping[str, Mapping[str, Sequence[float]]], rounds: int = 3, *, busy: bool = False) -> str:
    """The sentence about ``variants`` by their factors on the metrics of ``first``."""
    measured = {name for factors in variants.values() for name in factors}
    given: dict[str, Mapping[str, Sequence[float]]] = {"first": dict.fromkeys(measured, (1.0,) * 3), **variants}
    rows = [
        {"round": number, "variant": variant, "status": "finished", "machine_busy": busy, "others_cores": 1.5, "cores": 2.0,
         **{metric: 100.0 * factors.get(metric, SAME)[number] for metric in measured}}
        for number in range(rounds)
        for variant, factors in given.items()
    ]  # fmt: skip
    return answer(summarise(pd.DataFrame(rows), ["first", *variants]))


def test_gains_come_before_losses_and_noise_comes_last() -> None:
    assert said_of({"mp": {"output_throughput": SAME, "p99_ttft_ms": MORE, "p99_itl_ms": LESS}}) == (
        "Compared with first, mp has 0.30 times the ITL p99 (better), 2.30 times the TTFT p99 (worse), "
        "the same output throughput within noise (1%)."
    )


def test_a_metric_that_is_undecided_has_its_interval() -> None:
    assert said_of({"mp": {"output_throughput": MORE, "p99_itl_ms": SCATTERED}}) == (
        "Compared with first, mp has 2.30 times the output throughput (better), "
        "1.10 times the ITL p99 (undecided, from 0.43 to 2.46)."
    )


def test_two_variants_are_described_one_by_one() -> None:
    said = said_of({"mp": {"p99_itl_ms": LESS}, "mps": {"p99_itl_ms": MORE}})
    assert (
        said == "Compared with first, mp has 0.30 times the ITL p99 (better); mps has 2.30 times the ITL p99 (worse)."
    )


@pytest.mark.parametrize(
    ("rounds", "busy", "begin"),
    [
        (1, False, "Undecided after one round"),
        (3, False, "Undecided after 3 rounds"),
        (3, True, "Undecided after 3 rounds, since the machine was busy"),
    ],
)
def test_a_comparison_that_decides_nothing_says_so_first(rounds: int, busy: bool, begin: str) -> None:
    said = said_of({"mp": {"p99_itl_ms": SCATTERED}}, rounds, busy=busy)
    ratio = SCATTERED[0] if rounds == 1 else SCATTERED[1]
    assert said == f"{begin}: compared with first, mp has {ratio:.2f} times the ITL p99."


def test_of_many_variants_the_best_are_named() -> None:
    latency = {name: {"p99_itl_ms": factors} for name, factors in {"b": LESS, "c": MORE, "d": (0.5, 0.5, 0.5)}.items()}
    assert said_of({"a": {"output_throughput": MORE, "p99_ttft_ms": MORE}, **latency}) == (
        "Compared with first, a has the most output throughput (2.30 times, better); none has a better TTFT p99; "
        "b has the least ITL p99 (0.30 times, better)."
    )


def test_many_variants_after_one_round_are_undecided() -> None:
    said = said_of({name: {"p99_itl_ms": LESS if name == "c" else SAME} for name in "abcd"}, rounds=1)
    assert said == "Undecided after one round: compared with first, c has the least ITL p99 (0.30 times)."


def test_equal_to_the_last_digit_is_the_same() -> None:
    said = said_of({"mp": {"p99_itl_ms": (1.0, 1.0, 1.0)}})
    assert said == "Compared with first, mp has the same ITL p99 within noise."


def test_without_a_common_round_nothing_can_be_compared() -> None:
    rows = pd.DataFrame(
        {"round": [1, 2], "variant": ["first", "mp"], "status": "finished", "output_throughput": [1.0, 2.0]}
    )
    said = answer(summarise(rows, ["first", "mp"]))
    assert said == "Nothing can be compared with first: no round has figures of it and of another variant."
