"""The part of the report that compares runs: several runs given together, or the variants of a comparison."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from splitwiser.results.answer import answer
from splitwiser.results.paired import SummaryRow, summarise
from splitwiser.results.report.activity import span
from splitwiser.results.report.common import busy_warnings, failed_warnings, record_section, status_warnings
from splitwiser.results.report.folders import Comparison, Run
from splitwiser.results.report.of_run import distributions, run_part, thinned
from splitwiser.results.report.page import (
    Cell,
    Part,
    Pictures,
    Section,
    Table,
    Text,
    cell,
    frame_table,
    picture,
)
from splitwiser.results.report.plots import Spread, colours_of, draw_bars, draw_timeline, shown
from splitwiser.results.schema import METRIC, THROUGHPUT, shown_in


@dataclass(frozen=True)
class Variant:
    """A named variant: the folders of its runs, as far as they exist, and their rows of ``throughput.csv``."""

    name: str
    runs: Sequence[Run]
    rows: pd.DataFrame

    def spread(self, column: str) -> Spread | None:
        """Return the spread of a column's values; None if there are none."""
        values = [float(value) for value in self.rows[column].dropna()] if column in self.rows else []
        return Spread.of(values) if values else None

    @property
    def typical(self) -> Run | None:
        """The run whose throughput is closest to the median."""
        middle = self.spread("output_throughput")
        with_figures = [run for run in self.runs if cell(run.figures.get("output_throughput")).numeric]
        if middle is None or not with_figures:
            return next(iter(self.runs), None)
        return min(with_figures, key=lambda run: abs(float(run.figures["output_throughput"]) - middle.median))


def runs_part(runs: Sequence[Run], name: str) -> Part:
    """Return the part that compares ``runs`` with the first of them, as one round of a comparison."""
    labels = _labels(runs)
    rows = pd.DataFrame(
        [
            {"round": 1, "status": "finished", **run.figures, "variant": label}
            for label, run in zip(labels, runs, strict=True)
        ]
    )
    variants = [Variant(label, [run], rows[rows.variant == label]) for label, run in zip(labels, runs, strict=True)]
    summary = summarise(rows, labels)
    title = f"Comparison of {', '.join(labels)}" if len(runs) <= 4 else f"Comparison of {len(runs)} runs"
    caution = Text("One run each, at different times, does not show noise. splitwiser compare interleaves rounds.")
    return Part(
        name,
        title,
        answer(summary) if summary else "None of these runs has figures yet.",
        _pictures(variants, summary),
        [Section("Summary", [_summary_table(summary, f"{name}-summary"), caution])] if summary else [],
        about=[Text(f"{_what(runs)}.")],
        warnings=_different_questions(runs),
    )


def _what(runs: Sequence[Run]) -> str:
    """Return the model, dtype and device that all runs share."""
    said = []
    for name, word in (("model", ""), ("dtype", "in "), ("device", "on ")):
        values = {str(run.figures.get(name)) for run in runs}
        said += [f"{word}{values.pop()}"] if len(values) == 1 else []
    return " ".join(said) or "Different models"


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return the shortest distinct names for the runs: their modes, models and modes, or folder names."""
    candidates = (
        [run.mode for run in runs],
        [f"{run.figures.get('model')} {run.mode}" for run in runs],
        [run.path.resolve().name for run in runs],
    )
    return next((names for names in candidates if len(set(names)) == len(runs)), [str(run.path) for run in runs])


def _different_questions(runs: Sequence[Run]) -> list[str]:
    asked = ("model", "load_format", "dtype", "device", "total_input_tokens")
    differing = [name for name in asked if len({str(run.figures.get(name)) for run in runs}) > 1]
    labels = {column.name: column.label for column in THROUGHPUT}
    return (
        [
            f"These runs differ in {', '.join(labels[name] for name in differing)}: their modes alone do not explain "
            "their figures."
        ]
        if differing
        else []
    )


def comparison_part(comparison: Comparison, name: str) -> list[Part]:
    """Return the part about the comparison, then one part for each variant's typical run."""
    rows = comparison.rows.astype({"variant": str})
    finished = rows[rows.status == "finished"]
    variants = []
    for variant in rows.variant.unique():
        own = finished[finished.variant == variant]
        named = own.get("run_id", ())
        runs = [comparison.runs[run_id] for run_id in map(str, named) if run_id in comparison.runs]
        variants.append(Variant(variant, runs, own))
    summary = summarise(rows, [variant.name for variant in variants])
    tables = [Section("Summary", [_summary_table(summary, f"{name}-summary")])] if summary else []
    for title, short, frame, caption in (
        ("Tokens", "tokens", comparison.tokens, "How the tokens of each run differ, from comparison_tokens.csv."),
        ("Every run", "runs", rows, "One row per run, from comparison.csv."),
    ):
        if len(frame):
            table = frame_table(f"{name}-{short}", caption, frame, THROUGHPUT)
            tables.append(Section(title, [table], closed=True))
    part = Part(
        name,
        comparison.path.resolve().name,
        answer(summary) if summary else f"None of {len(rows)} runs finished.",
        _pictures(variants, summary),
        tables,
        record_section(comparison.record, f"{name}-record", "compare.yaml"),
        warnings=status_warnings(comparison.record, "compare.yaml")
        + failed_warnings(rows)
        + busy_warnings(rows, "variant"),
    )
    typical = [(variant, run) for variant in variants if (run := variant.typical) is not None]
    details = [
        run_part(run, f"{name}-{number}", f"{variant.name}: {run.path.name}", closed=True)
        for number, (variant, run) in enumerate(typical, start=1)
    ]
    return [part, *details]


def _summary_table(summary: Sequence[SummaryRow], name: str) -> Table:
    """Return one row per metric: the median of each variant and, after the first, its ratio to the first and the verdict."""
    first, *others = dict.fromkeys(row.variant for row in summary)
    headings = ["Metric", first]
    for other in others:
        headings += [other, f"{other} / {first}", "Verdict"]
    rows = []
    for metric, (base, *of) in itertools.groupby(summary, key=lambda row: row.metric):
        cells = [cell(METRIC[metric].title_with_unit), cell(base.median)]
        for row in of:
            cells += [cell(row.median), _range(row.ratio_median, row.ratio_low, row.ratio_high), cell(row.verdict)]
        rows.append(cells)
    rounds = max(row.rounds for row in summary)
    several = f"Medians over {rounds} rounds; ratios are of the same round, with their 95% interval in brackets."
    return Table(name, several if rounds > 1 else "Ratios are of one round.", headings, rows)


def _range(value: float | None, low: float | None, high: float | None) -> Cell:
    """Return ``value`` with the range that it lies in as a cell that sorts by ``value``."""
    if value is None:
        return cell(None)
    span = "" if low is None or high is None or low == high else f" ({shown(low)} to {shown(high)})"
    return Cell(f"{shown(value)}{span}", repr(value), True)


def _pictures(variants: Sequence[Variant], summary: Sequence[SummaryRow]) -> list[Section]:
    verdicts = {(row.metric, row.variant): row.verdict or "" for row in summary}
    colours = colours_of(variant.name for variant in variants)
    bars = []
    for metric in shown_in("report"):
        spreads = {variant.name: each for variant in variants if (each := variant.spread(metric.name)) is not None}
        if not spreads:
            continue
        said = {name: verdicts.get((metric.name, name), "") for name in spreads}
        words = "; ".join(
            ", ".join(filter(None, [f"{name} {_range(each.median, each.least, each.greatest).text}", said[name]]))
            for name, each in spreads.items()
        )
        remarks = {name: text.split(" (")[0] for name, text in said.items()}
        svg = draw_bars(metric.title, metric.axis_label, spreads, colours, remarks)
        bars.append(picture(svg, f"{metric.title} in {metric.unit}: {words}", wide=False))
    many = max((len(variant.rows) for variant in variants), default=0) > 1
    note = [Text("Bars are medians over rounds; the lines on them span the minimum to the maximum.")] if many else []
    sections = [Section("Comparison", [Pictures(bars), *note])] if bars else []
    typical = {variant.name: run for variant in variants if (run := variant.typical) is not None and len(run.steps)}
    if typical:
        window = (0.0, max(span(run.steps, run.latency) for run in typical.values()))
        svg, bin_s = draw_timeline({name: run.steps for name, run in typical.items()}, window, titled=True)
        chosen = "For each, the run whose throughput is closest to the median. " if many else ""
        words = f"Timelines of {', '.join(typical)} on a common time axis"
        sections.append(Section("Timelines", [picture(svg, words, chosen + thinned(bin_s))]))
    with_runs = {variant.name: variant.runs for variant in variants if variant.runs}
    if with_runs:
        sections.append(Section("Distributions", distributions(with_runs, colours)))
    return sections
