"""The arithmetic of a comparison: medians, ratios round by round, what is noise, and where tokens differ."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

METRICS = (
    "output_throughput", "total_token_throughput", "request_goodput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms",
    "p99_itl_ms", "median_tpot_ms", "median_e2el_ms", "p99_e2el_ms", "peak_memory_mb", "ready_s",
)  # fmt: skip
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, 97.5% quantile, at 1, 2, ... degrees of freedom; the last serves for all above, which errs towards noise."""


def headline_metrics(columns: Sequence[str]) -> list[str]:
    """Those of :data:`METRICS` that ``columns`` have, and the ROUGE scores."""
    return [name for name in METRICS if name in columns] + [name for name in columns if name.startswith("rouge")]


@dataclass(frozen=True)
class SummaryRow:
    """A metric of a variant over its finished rounds, and its ratio to the first variant's in the same round."""

    metric: str
    variant: str
    rounds: int
    median: float | None
    least: float | None
    greatest: float | None
    ratio_median: float | None
    ratio_least: float | None
    ratio_greatest: float | None
    within_noise: bool | None


def summarise(rows: pd.DataFrame, variants: Sequence[str]) -> list[SummaryRow]:
    """A row a headline metric and variant; ratios are to the first of ``variants``, which has none itself.

    ``rows`` are those of ``comparison.csv``: columns ``round``, ``variant``, ``status`` and figures.
    """
    finished = rows[rows["status"] == "finished"]
    table = []
    for metric in headline_metrics(list(rows.columns)):
        values = {name: finished[finished["variant"] == name].set_index("round")[metric].dropna() for name in variants}
        for variant, own in values.items():
            ratios = round_ratios(own, values[variants[0]]) if variant != variants[0] else []
            spreads = *_spread(own.to_list()), *_spread(ratios)
            table.append(SummaryRow(metric, variant, len(own), *spreads, within_noise(ratios)))
    return table


def round_ratios(values: pd.Series, first: pd.Series) -> list[float]:
    """``values`` over ``first`` in each round (their index) that both have; a round where one is 0 has no ratio."""
    return [
        float(values[number] / first[number])
        for number in values.index
        if number in first.index and values[number] > 0 and first[number] > 0
    ]


def within_noise(ratios: Sequence[float]) -> bool | None:
    """Whether the rounds leave it open that the two are equal; None if there are fewer than two.

    The ratios of a round share its drift, so they scatter about the true ratio. The rule: the 95% confidence interval of
    their mean logarithm, mean +- t(n - 1) * s / sqrt(n), holds 0 (a paired t-test on logarithms; s has n - 1 in its
    denominator). With few rounds t is wide: at a scatter of 2% a difference shows from some 5% on at 3 rounds, 2.5% at
    5, 1.4% at 10. One pair in twenty that is equal will still show a difference.
    """
    if len(ratios) < 2:
        return None
    logarithms = [math.log(ratio) for ratio in ratios]
    freedom = len(ratios) - 1
    half_width = T_975[min(freedom, len(T_975)) - 1] * float(np.std(logarithms, ddof=1)) / math.sqrt(len(ratios))
    return bool(abs(np.mean(logarithms)) <= half_width)


def _spread(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Median, least and greatest."""
    if not values:
        return None, None, None
    return float(np.median(values)), float(min(values)), float(max(values))


Made = tuple[str, str]  # the token ids of a request's prompt and of its answer, as text


@dataclass(frozen=True)
class TokenDifference:
    """One run's tokens against another's: requests in either, those whose prompts differ, those whose answers do, and the
    median position (from 0) of the first token that differs, None if none does."""

    requests: int
    other_prompts: int
    differ: int
    first_difference: float | None


def compare_tokens(made: Mapping[int, Made], reference: Mapping[int, Made]) -> TokenDifference:
    """Compare by request; one that only one side answered counts as differing, at no position."""
    requests = made.keys() | reference.keys()
    both = made.keys() & reference.keys()
    differing = [number for number in both if made[number][1] != reference[number][1]]
    positions = [_first_difference(made[number][1].split(), reference[number][1].split()) for number in differing]
    return TokenDifference(
        requests=len(requests),
        other_prompts=sum(made[number][0] != reference[number][0] for number in both),
        differ=len(differing) + len(requests) - len(both),
        first_difference=float(np.median(positions)) if positions else None,
    )


def _first_difference(made: Sequence[str], reference: Sequence[str]) -> int:
    """Where two different sequences part; at the shorter one's end if it begins the other."""
    pairs = zip(made, reference, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(made), len(reference)))
