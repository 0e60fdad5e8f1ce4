"""The part of the report that compares runs: several runs given together, or the variants of a comparison."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from splitwiser.results.report.activity import span
from splitwiser.results.report.common import busy_warnings, failed_warnings, record_section, status_warnings
from splitwiser.results.report.folders import Comparison, Run
from splitwiser.results.report.of_run import distributions, run_part, thinned
from splitwiser.results.report.page import Part, Pictures, Section, Table, Text, cell, frame_table, picture
from splitwiser.results.report.plots import Spread, draw_bars, draw_timeline, shown
from splitwiser.results.schema import shown_in

_MARKS = {"≈": "equal", "?": "undecided"}


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
    """Return the part that compares ``runs``: their metrics, the ratios to the first run, and plots of all."""
    labels = _labels(runs)
    variants = [Variant(label, [run], pd.DataFrame([run.figures])) for label, run in zip(labels, runs, strict=True)]
    first = variants[0]
    headings = ["", "unit", first.name, *itertools.chain(*((each.name, f"over {first.name}") for each in variants[1:]))]
    rows = []
    for metric in shown_in("report"):
        column, label, unit = metric.name, metric.title, metric.unit
        spreads = [variant.spread(column) for variant in variants]
        if any(spreads):
            base, *others = [spread.median if spread else None for spread in spreads]
            row = [cell(label), cell(unit), cell(base)]
            for other in others:
                row += [cell(other), cell(other / base if base and other is not None else None)]
            rows.append(row)
    table = Table(f"{name}-summary", f"From each run's throughput.csv; ratios are to {first.name}.", headings, rows)
    verdict = f"{_what(runs)}: {_throughputs(variants)}."
    warnings = _different_questions(runs)
    caution = Text(
        "One run each, at different times: the table does not show noise. splitwiser compare interleaves rounds."
    )
    sections = [Section("Summary", [table, caution]), *_against(variants, {})]
    title = f"Comparison of {', '.join(labels)}" if len(runs) <= 4 else f"Comparison of {len(runs)} runs"
    return Part(name, title, verdict, sections, warnings)


def _throughputs(variants: Sequence[Variant]) -> str:
    reached = {variant.name: variant.spread("output_throughput") for variant in variants}
    said = [f"{name} {shown(spread.median)}" for name, spread in reached.items() if spread is not None]
    return f"{', '.join(said)} tokens/s out" if said else ""


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
    return (
        [f"These runs differ in {', '.join(differing)}: their modes alone do not explain their figures."]
        if differing
        else []
    )


def comparison_part(comparison: Comparison, name: str) -> list[Part]:
    """Return the part about the comparison, then one part for each variant's typical run."""
    rows = comparison.rows
    finished = rows[rows.status == "finished"]
    variants = []
    for variant in rows.variant.unique():
        own = finished[finished.variant == variant]
        named = own["run_id"].astype(str) if "run_id" in own else []
        runs = [comparison.runs[run_id] for run_id in named if run_id in comparison.runs]
        variants.append(Variant(str(variant), runs, own))
    rounds = rows["round"].nunique()
    names = ", ".join(variant.name for variant in variants)
    verdict = f"{names} over {rounds} rounds; {len(finished)} of {len(rows)} runs finished."
    if reached := _throughputs(variants):
        verdict += f" Medians: {reached}."
    summary = comparison.summary
    caption = "comparison_summary.csv; ratios are to the first."
    sections = [Section("Summary", [frame_table(f"{name}-summary", caption, summary)])]
    bars, *pictures = _against(variants, _verdicts(summary))
    sections = [bars, *sections, *pictures]
    if len(comparison.tokens):
        sections.append(
            Section("Tokens", [frame_table(f"{name}-tokens", "comparison_tokens.csv.", comparison.tokens)], closed=True)
        )
    sections.append(
        Section("Every run", [frame_table(f"{name}-runs", "comparison.csv.", rows, drop_empty=True)], closed=True)
    )
    sections.append(record_section(comparison.record, f"{name}-record", "compare.yaml"))
    title = comparison.path.resolve().name
    warnings = (
        status_warnings(comparison.record, "compare.yaml") + failed_warnings(rows) + busy_warnings(rows, "variant")
    )
    typical = [(variant, run) for variant in variants if (run := variant.typical) is not None]
    details = [
        run_part(run, f"{name}-{number}", f"{variant.name}: {run.path.name}", closed=True)
        for number, (variant, run) in enumerate(typical, start=1)
    ]
    return [Part(name, title, verdict, sections, warnings), *details]


def _verdicts(summary: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Return the summary's verdict for each (metric, variant) that has one."""
    if not {"metric", "variant", "verdict"} <= set(summary.columns):
        return {}
    said = summary.dropna(subset=["verdict"]).astype(str)
    return dict(zip(zip(said.metric, said.variant, strict=True), said.verdict, strict=True))


def _mark(verdict: str) -> str:
    """Return the mark after a variant's name if it is neither better nor worse."""
    return next((f" {mark}" for mark, word in _MARKS.items() if verdict.startswith(word)), "")


def _against(variants: Sequence[Variant], verdicts: Mapping[tuple[str, str], str]) -> list[Section]:
    bars = []
    used = set()
    for metric in shown_in("report"):
        column, label, unit = metric.name, metric.title, metric.unit
        spreads = {variant.name: spread for variant in variants if (spread := variant.spread(column)) is not None}
        if spreads:
            said = {name: verdicts.get((column, name), "") for name in spreads}
            used |= {_mark(verdict).strip() for verdict in said.values()}
            marked = {f"{name}{_mark(said[name])}": each for name, each in spreads.items()}
            words = "; ".join(
                f"{name} {_range(spread)}{', ' if said[name] else ''}{said[name]}" for name, spread in spreads.items()
            )
            bars.append(picture(draw_bars(label, unit, marked), f"{label} in {unit}: {words}", wide=False))
    many = max((len(variant.rows) for variant in variants), default=0) > 1
    note = "Bars are medians over rounds; the lines on them span the minimum to the maximum. " if many else ""
    note += "".join(f"{mark}: {word}, compared with the first. " for mark, word in _MARKS.items() if mark in used)
    sections = [Section("Comparison", [Pictures(bars), *([Text(note.strip())] if note else [])])]
    with_runs = {variant.name: variant.runs for variant in variants if variant.runs}
    if with_runs:
        sections.append(Section("Distributions", distributions(with_runs)))
    typical = {variant.name: run for variant in variants if (run := variant.typical) is not None and len(run.steps)}
    if typical:
        window = (0.0, max(span(run.steps, run.latency) for run in typical.values()))
        svg, bin_s = draw_timeline({name: run.steps for name, run in typical.items()}, window, titled=True)
        chosen = "For each, the run whose throughput is closest to the median. " if many else ""
        words = f"Timelines of {', '.join(typical)} on a common time axis"
        sections.insert(1, Section("Timelines", [picture(svg, words, chosen + thinned(bin_s))]))
    return sections


def _range(spread: Spread) -> str:
    if spread.least == spread.greatest:
        return shown(spread.median)
    return f"{shown(spread.median)} ({shown(spread.least)} to {shown(spread.greatest)})"
