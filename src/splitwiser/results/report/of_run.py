"""The part of the report about a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from splitwiser.machine.load import busy_note
from splitwiser.results.report.activity import FloatArray, PhaseActivity, busy_seconds, inter_token_gaps, span
from splitwiser.results.report.common import MOST_ROWS, measure, record_section, status_warnings
from splitwiser.results.report.folders import Run
from splitwiser.results.report.page import (
    NOTHING,
    Block,
    Example,
    Figures,
    Part,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
    cell,
    frame_table,
    picture,
)
from splitwiser.results.report.plots import colours_of, draw_distributions, draw_progress, draw_timeline, shown
from splitwiser.results.schema import LATENCIES, LATENCY, STATISTICS, THROUGHPUT, Column, shown_in

ZOOMED_STEPS = 60  # about how many steps the close-up of the timeline shows
EXAMPLES = 3  # generations shown
WORKERS = (
    Column("busy_s", "Time in steps.", "s"),
    Column("busy_percent", "Share of the run in steps.", "%", short_name="share of the run"),
    Column("mean_step_ms", "Mean time of a step.", "ms"),
)  # of the table of workers


def run_part(run: Run, name: str, title: str, *, closed: bool = False) -> Part:
    """Return the part about ``run`` with everything from its files."""
    pictures, tables = [], []
    if len(run.steps):
        pictures.append(Section("Timeline", _timeline(run)))
        pictures.append(Section("Throughput over time", [_progress(run)]))
    if len(run.latency):
        pictures.append(Section("Distributions", distributions({run.mode: [run]}, colours_of([run.mode]))))
    if run.figures:
        tables.append(Section("Latency", [_latency_table(run, f"{name}-latency")]))
    if len(run.steps):
        tables.append(Section("Workers", _workers(run, name)))
    if run.generations.summary_gen.notna().any():
        tables.append(Section("Generated texts", _generations(run)))
    if len(run.latency):
        ordered = run.latency.sort_values("request_id")
        caption = "One row per request, from latency.csv."
        requests = frame_table(f"{name}-requests", caption, ordered, LATENCY, most=MOST_ROWS)
        tables.append(Section("Requests", [requests], closed=True))
    if run.figures:
        tables.append(Section("All figures", [_figures_table(run, f"{name}-throughput")], closed=True))
    record = record_section(run.record, f"{name}-record", "run.yaml")
    return Part(name, title, _answer(run), pictures, tables, record, [_headlines(run)], _run_warnings(run), closed)


def _answer(run: Run) -> str:
    figures, record = run.figures, run.record
    if not figures:
        return f"mode {run.mode}: {len(run.latency):,} requests had finished when the files were last written."
    dummy = " (dummy weights)" if figures.get("load_format") == "dummy" else ""
    said = [
        f"{measure(figures, 'completed', 'requests')} in {measure(figures, 'duration', 's')}",
        f"{measure(figures, 'output_throughput', 'tokens/s')} out",
        f"TTFT p50 {measure(figures, 'median_ttft_ms', 'ms')}",
        f"ITL p50 {measure(figures, 'median_itl_ms', 'ms')}",
    ]
    return (
        f"{', '.join(said)}: {figures.get('model')}{dummy}, mode {run.mode} ({figures.get('workers')}) on "
        f"{_device(record, figures)} in {figures.get('dtype')}."
    )


def _device(record: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    machine = record.get("machine")
    named = machine.get("gpu") or machine.get("processor") if isinstance(machine, dict) else None
    return f"{figures.get('device')} ({named})" if named else str(figures.get("device"))


def _run_warnings(run: Run) -> list[str]:
    warnings = status_warnings(run.record, "run.yaml")
    failed = run.figures.get("failed", 0)
    if failed > 0:
        warnings.append(f"{cell(failed).text} requests were not answered; run.yaml lists them.")
    cancelled = run.figures.get("cancelled", 0)
    if cancelled > 0:
        warnings.append(
            f"{cell(cancelled).text} requests were cancelled: their tokens and times count as far as they came, and their "
            "E2E does not."
        )
    if note := busy_note(run.figures):
        warnings.append(f"The machine was busy: {note}.")
    model = run.record.get("model")
    notes = model.get("notes") if isinstance(model, dict) else None
    return warnings + [f"Note: {note}." for note in notes or []]


def _headlines(run: Run) -> Figures:
    figures = run.figures
    tiles = [
        (metric.title, cell(figures[metric.name]).text, metric.unit, "")
        for metric in shown_in("report")
        if metric.name in figures and cell(figures[metric.name]).numeric
    ]
    if figures:
        asked = (
            f"{measure(figures, 'total_input_tokens', 'tokens in')}, {measure(figures, 'total_output_tokens', 'out')}"
        )
        tiles.insert(0, ("Requests", cell(figures["completed"]).text, "", asked))
    if len(run.steps):
        overlap = PhaseActivity(run.steps).overlap()
        both = overlap.both_s / (span(run.steps, run.latency) or 1) * 100
        tiles.append(("Both phases active", f"{both:.1f}", "%", "of the run"))
    return Figures(tiles)


def _timeline(run: Run) -> list[Block]:
    steps, whole = run.steps, (0.0, span(run.steps, run.latency))
    svg, bin_s = draw_timeline({run.mode: steps}, whole)
    caption = f"The whole run: {len(steps):,} steps. {thinned(bin_s)}"
    blocks: list[Block] = [picture(svg, _timeline_words(run), caption)]
    if len(steps) > 2 * ZOOMED_STEPS:
        length = whole[1] * ZOOMED_STEPS / len(steps)
        start, end = PhaseActivity(steps).busiest_window(length)
        svg, bin_s = draw_timeline({run.mode: steps}, (start, end))
        caption = (
            f"A close-up of the {shown(length * 1e3)} ms with the most overlap or, without any, most of both phases."
        )
        words = f"Timeline of the steps from {start:.3f} to {end:.3f} s"
        blocks.append(picture(svg, words, f"{caption} {thinned(bin_s)}"))
    return blocks


def thinned(bin_s: float | None) -> str:
    """Return how to read a timeline; ``bin_s`` is the one that :func:`draw_timeline` returned."""
    if bin_s is None:
        return "Each bar is a step; hover over it for details."
    return (
        f"Too many steps to draw each one: the height of a lane is the share of each {shown(bin_s * 1e3)} ms in which it "
        "was active."
    )


def _timeline_words(run: Run) -> str:
    overlap = PhaseActivity(run.steps).overlap()
    return (
        f"Timeline of mode {run.mode}: prefill active for {shown(overlap.prefill_s)} s, decode for "
        f"{shown(overlap.decode_s)} s, both for {shown(overlap.both_s)} s"
    )


def _progress(run: Run) -> Picture:
    svg, bin_s = draw_progress(run.steps, run.latency)
    caption = (
        f"Means over {shown(bin_s * 1e3)} ms; a step's tokens are spread evenly over its time. A request's first token "
        "comes from prefill and does not count for decode. Requests are counted at the start of each bin."
    )
    if run.record.get("status") != "finished":
        caption += " Only finished requests are shown; latency.csv has no others."
    return picture(svg, "Tokens per second of decode and of prefill, and requests in flight, over the run", caption)


def distributions(samples: Mapping[str, Sequence[Run]], colours: Mapping[str, str]) -> list[Block]:
    """Return plots of the distributions of TTFT, ITL and E2E, with one curve per name, in its colour, over all requests of
    its runs."""
    pooled = {name: [run for run in runs if len(run.latency)] for name, runs in samples.items()}
    pooled = {name: runs for name, runs in pooled.items() if runs}
    pictures = []
    for column, title in (("ttft_ms", "TTFT"), ("e2el_ms", "E2E")):
        values = {name: _pool(runs, column) for name, runs in pooled.items()}
        pictures.append(_distribution(values, f"{title} by request", colours))
    gaps = {name: [inter_token_gaps(run.steps, run.latency) for run in runs] for name, runs in pooled.items()}
    known = {
        name: np.concatenate([each for each in of if each is not None]) for name, of in gaps.items() if _all_known(of)
    }
    if len(known) == len(gaps):
        pictures.insert(1, _distribution(known, "ITL, every gap", colours, log=True))
        said = (
            "ITL is every gap between two tokens of a request. It follows from steps.csv: a request gets a token in each "
            "step of its decode worker from handoff to end. The number of these steps was checked for every request."
        )
    else:
        for column, title in (("itl_p50_ms", "median"), ("itl_p99_ms", "99th percentile")):
            values = {name: _pool(runs, column) for name, runs in pooled.items()}
            if all(map(len, values.values())):
                pictures.append(_distribution(values, f"each request's {title} ITL", colours, log=True))
        said = "steps.csv does not determine every gap, so ITL is shown by its percentiles within each request."
    read = "Dots mark the median (p50) and the 99th percentile (p99)."
    return [Pictures(pictures), Text(f"{read} {said}")]


def _all_known(gaps: Sequence[FloatArray | None]) -> bool:
    return all(each is not None for each in gaps)


def _pool(runs: Sequence[Run], column: str) -> FloatArray:
    columns = [run.latency[column].dropna().to_numpy(dtype=float) for run in runs if column in run.latency]
    return np.concatenate(columns) if columns else np.empty(0)


def _distribution(
    samples: Mapping[str, FloatArray], title: str, colours: Mapping[str, str], *, log: bool = False
) -> Picture:
    words = "; ".join(
        f"{name} median {shown(float(np.median(values)))} ms, 99th percentile {shown(float(np.percentile(values, 99)))} ms"
        for name, values in samples.items()
    )
    svg = draw_distributions(samples, "ms", title, colours, log=log)
    return picture(svg, f"Distribution of {title}: {words}", wide=False)


def _latency_table(run: Run, name: str) -> Table:
    rows = [
        [cell(latency.title), *(cell(run.figures.get(latency.column(statistic))) for statistic in STATISTICS)]
        for latency in LATENCIES
        if cell(run.figures.get(latency.column("mean"))).numeric
    ]
    caption = "In ms, from throughput.csv. ITL is over every gap of every request, the others are over requests."
    return Table(name, caption, ["Latency", *STATISTICS.values()], rows)


def _figures_table(run: Run, name: str) -> Table:
    """Return the row of ``throughput.csv`` as one row per figure, without those that it does not have."""
    rows = []
    known = {column.name: column for column in THROUGHPUT}
    for key, value in run.figures.items():
        shown_value = cell(value)
        if shown_value.text != NOTHING:
            column = known.get(key, Column(key, ""))
            rows.append([cell(column.title), shown_value, cell(column.unit), cell(column.description)])
    return Table(name, "The row of throughput.csv.", ("Figure", "Value", "Unit", "Meaning"), rows, long=True)


def _workers(run: Run, name: str) -> list[Block]:
    whole = span(run.steps, run.latency)
    busy = busy_seconds(run.steps)
    busy.insert(4, "busy_percent", busy.busy_s / whole * 100)
    overlap = PhaseActivity(run.steps).overlap()
    times = {
        "prefill": overlap.prefill_s,
        "decode": overlap.decode_s,
        "both": overlap.both_s,
        "neither": whole - overlap.either_s,
    }
    rows = [[cell(phase), cell(seconds), cell(seconds / whole * 100)] for phase, seconds in times.items()]
    caption = "Time during which the phases were active; in a hybrid step both are."
    return [
        frame_table(f"{name}-workers", f"From steps.csv; shares are of {shown(whole)} s.", busy, WORKERS),
        Table(
            f"{name}-overlap",
            caption,
            ("Active", "Time, s", "Share, %"),
            rows,
        ),
    ]


def _generations(run: Run) -> list[Block]:
    rows = run.generations.sort_values("request_id").head(EXAMPLES).to_dict("records")
    named = {"finding": _asked(run), "summary_ref": "Reference", "summary_gen": "Generated"}
    return [
        Example(
            f"Request {row['request_id']}",
            [
                (named.get(str(column), str(column)), cell(value).text)
                for column, value in row.items()
                if column == "summary_gen" or (column != "request_id" and value == value)
            ],
        )
        for row in rows
    ]


def _asked(run: Run) -> str:
    """Return what a request's text is: the column of the reports that a case's prompts are made from, or a prompt."""
    configuration = run.record.get("configuration")
    asked = configuration if isinstance(configuration, dict) else {}
    if any(asked.get(source) is not None for source in ("workload", "trace", "prompt_tokens")):
        return "Prompt"
    return str(asked.get("finding_column", "prompt")).capitalize()
