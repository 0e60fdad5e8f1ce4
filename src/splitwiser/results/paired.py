"""The statistics of a comparison: medians, ratios by round, their verdicts, and differences of tokens."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from splitwiser.results.busy import busy_runs
from splitwiser.results.schema import METRIC, column, shown_in

ROUNDING = 1e-9  # ratios this close to 1 are of equal figures, whose sums were rounded differently
NARROW = 0.03  # two variants are equal if the interval of their ratio is within this of 1


def headline_metrics(columns: Sequence[str]) -> list[str]:
    """Return the names of the compared metrics that are among ``columns``."""
    return [metric.name for metric in shown_in("compare") if metric.name in columns]


@dataclass(frozen=True)
class SummaryRow:
    """A metric of a variant over its finished rounds, its ratio to the first variant's in the same round, the ratio's 95%
    interval (:func:`interval`), and the verdict (:func:`decide`)."""

    metric: str = column("Column of throughput.csv.")
    variant: str = column("Name of the variant.")
    rounds: int = column("Finished rounds that have this metric.", "rounds")
    median: float | None = column("Median over the finished rounds.", "that of the metric")
    least: float | None = column("Minimum over the finished rounds.", "that of the metric")
    greatest: float | None = column("Maximum over the finished rounds.", "that of the metric")
    ratio_median: float | None = column("Median of the ratios to the first variant in the same round.")
    ratio_least: float | None = column("Minimum of these ratios.")
    ratio_greatest: float | None = column("Maximum of these ratios.")
    ratio_low: float | None = column("Lower end of the 95% interval of the mean ratio (geometric).")
    ratio_high: float | None = column("Upper end of that interval.")
    verdict: str | None = column(
        "better, worse, equal within X%, or undecided with the reason; empty for the first variant."
    )


def summarise(rows: pd.DataFrame, variants: Sequence[str]) -> list[SummaryRow]:
    """Return one row per variant and headline metric that any variant has; ratios are to the first of ``variants``, which
    has none itself.

    ``rows`` are those of ``comparison.csv``: columns ``round``, ``variant``, ``status`` and metrics.
    """
    finished = rows[rows["status"] == "finished"]
    runs = {name: finished[finished["variant"] == name] for name in variants}
    busy = {
        name: set(busy_runs(own)["round"]) | set(busy_runs(runs[variants[0]])["round"]) for name, own in runs.items()
    }
    table = []
    for metric in headline_metrics(list(rows.columns)):
        values = {name: own.set_index("round")[metric].dropna() for name, own in runs.items()}
        if all(own.empty for own in values.values()):
            continue
        for variant, own in values.items():
            ratios = round_ratios(own, values[variants[0]]) if variant != variants[0] else {}
            given = list(ratios.values())
            spreads = *_spread(own.to_list()), *_spread(given)
            low, high = interval(given) or (None, None)
            verdict = decide(metric, ratios, busy[variant])
            table.append(SummaryRow(metric, variant, len(own), *spreads, low, high, verdict))
    return table


def round_ratios(values: pd.Series, first: pd.Series) -> dict[int, float]:
    """Return ``values`` over ``first`` for each round (their index) that both have; rounds with a 0 have no ratio."""
    return {
        int(number): float(values[number] / first[number])
        for number in values.index
        if number in first.index and values[number] > 0 and first[number] > 0
    }


def interval(ratios: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% confidence interval of the ratio that underlies those of the rounds; None for fewer than two.

    The two runs of a round share its drift. The interval is the logarithms' mean +- t(n - 1) * s / sqrt(n) (a paired t-test
    on logarithms; s has n - 1 in its denominator). With few rounds t is wide: with 2% noise, differences from about 5% on
    show at 3 rounds, 2.5% at 5, 1.4% at 10. One in twenty pairs that are equal will still show a difference.
    """
    if len(ratios) < 2:
        return None
    from scipy.special import stdtrit  # Student's t; slow to import, so not at start-up

    logarithms = [math.log(ratio) for ratio in ratios]
    freedom, mean = len(ratios) - 1, float(np.mean(logarithms))
    half_width = float(stdtrit(freedom, 0.975)) * float(np.std(logarithms, ddof=1)) / math.sqrt(len(ratios))
    return math.exp(mean - half_width), math.exp(mean + half_width)


def decide(metric: str, ratios: Mapping[int, float], busy: Collection[int] = ()) -> str | None:
    """Return the verdict on ``ratios`` of ``metric`` by round: ``better`` or ``worse`` than the baseline if their
    :func:`interval` excludes 1; ``equal within X%`` if it is narrow around 1; else ``undecided`` with the reason. It is also
    undecided if the machine was ``busy`` in some of the rounds, unless the load does not affect the metric. None without
    ratios."""
    if not ratios:
        return None
    disturbed = sum(number in busy for number in ratios)
    if disturbed and METRIC[metric].timed:
        return f"undecided (busy machine in {disturbed} of {len(ratios)} rounds)"
    found = interval(list(ratios.values()))
    if found is None:
        return "undecided (one round)"
    low, high = found
    if low > 1 + ROUNDING or high < 1 - ROUNDING:
        return "better" if (low > 1) is METRIC[metric].more_is_better else "worse"
    off = max(high, 1 / low) - 1
    if off > NARROW:
        return f"undecided (from {low:.2f} to {high:.2f})"
    return f"equal within {math.ceil(100 * off - ROUNDING)}%" if off > ROUNDING else "equal"


def _spread(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the median, minimum and maximum."""
    if not values:
        return None, None, None
    return float(np.median(values)), float(min(values)), float(max(values))


Made = tuple[str, str]  # the token ids of a request's prompt and of its answer, as text


@dataclass(frozen=True)
class TokenDifference:
    """How the tokens of two runs differ: requests in either, those whose prompts differ, those whose answers differ, and the
    median position (from 0) of the first different token, None if all are equal."""

    requests: int = column("Requests that either run answered.", "requests")
    other_prompts: int = column("Requests whose prompts differ.", "requests")
    differ: int = column("Requests whose answers differ.", "requests")
    first_difference: float | None = column(
        "Median position of the first different token, from 0; empty if all are equal.", "tokens"
    )


def compare_tokens(made: Mapping[int, Made], reference: Mapping[int, Made]) -> TokenDifference:
    """Return the differences by request; a request that only one run answered counts as different, without a position."""
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
    """Return the first position at which two different sequences differ; the shorter length if one is a prefix."""
    pairs = zip(made, reference, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(made), len(reference)))
