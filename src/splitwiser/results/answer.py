"""Says in one sentence what a comparison found. The table of ``splitwiser compare`` and the report both use it."""

from collections.abc import Iterator, Sequence

from splitwiser.results.paired import SummaryRow
from splitwiser.results.schema import METRIC

MOST_NAMED = 3  # variants beside the first that are described one by one; of more, the best for each metric are named
_VERDICTS = ("better", "worse", "equal", "undecided")  # first words of verdicts, in the order in which they are told


def answer(summary: Sequence[SummaryRow]) -> str:
    """Return the sentence about ``summary``, the rows of :func:`~splitwiser.results.paired.summarise`: how the metrics that
    matter most compare with the first variant's, and whether the rounds decide it."""
    first = summary[0].variant
    told = [row for row in summary if row.verdict is not None and "answer" in METRIC[row.metric].shown]
    if not told:
        return f"Nothing can be compared with {first}: no round has figures of it and of another variant."
    decided = any(_word(row) != "undecided" for row in told)
    variants = list(dict.fromkeys(row.variant for row in told))
    clauses = _by_metric(told, decided) if len(variants) > MOST_NAMED else _by_variant(told, variants, decided)
    said = f"ompared with {first}, {'; '.join(clauses)}."
    if decided:
        return f"C{said}"
    rounds = max(row.rounds for row in told)
    after = "one round" if rounds == 1 else f"{rounds} rounds"
    why = ", since the machine was busy" if any("busy" in str(row.verdict) for row in told) else ""
    return f"Undecided after {after}{why}: c{said}"


def _by_variant(told: Sequence[SummaryRow], variants: Sequence[str], decided: bool) -> Iterator[str]:
    for variant in variants:
        own = sorted((row for row in told if row.variant == variant), key=lambda row: _VERDICTS.index(_word(row)))
        yield f"{variant} has {', '.join(_amount(row, decided) for row in own)}"


def _by_metric(told: Sequence[SummaryRow], decided: bool) -> Iterator[str]:
    for name in dict.fromkeys(row.metric for row in told):
        metric = METRIC[name]
        of = [row for row in told if row.metric == name]
        candidates = [row for row in of if _word(row) == "better"] or [row for row in of if _word(row) == "undecided"]
        if not candidates:
            yield f"none has a better {metric.label}"
            continue
        best = (max if metric.more_is_better else min)(candidates, key=lambda row: row.ratio_median or 0)
        most = "most" if metric.more_is_better else "least"
        yield f"{best.variant} has the {most} {metric.label} ({best.ratio_median:.2f} times{_detail(best, decided)})"


def _amount(row: SummaryRow, decided: bool) -> str:
    """Return a phrase such as ``0.30 times the ITL p99 (better)``."""
    label = METRIC[row.metric].label
    if _word(row) == "equal":
        within = str(row.verdict).removeprefix("equal").replace("within ", "")
        return f"the same {label} within noise{f' ({within.strip()})' if within else ''}"
    detail = _detail(row, decided).removeprefix(", ")
    return f"{row.ratio_median:.2f} times the {label}{f' ({detail})' if detail else ''}"


def _detail(row: SummaryRow, decided: bool) -> str:
    """Return the verdict, or nothing if the sentence begins with it."""
    return f", {str(row.verdict).replace(' (', ', ').rstrip(')')}" if decided else ""


def _word(row: SummaryRow) -> str:
    return str(row.verdict).split()[0]
