"""The part of the report about a sweep."""

from collections.abc import Sequence

import pandas as pd

from splitwiser.results.report.common import (
    MOST_LINES,
    MOST_ROWS,
    busy_warnings,
    failed_warnings,
    record_section,
    setting,
    status_warnings,
)
from splitwiser.results.report.folders import Sweep
from splitwiser.results.report.page import Part, Picture, Pictures, Section, Text, frame_table, picture
from splitwiser.results.report.plots import Spread, draw_bars, draw_lines, shown
from splitwiser.results.schema import THROUGHPUT, shown_in


def sweep_part(sweep: Sweep, name: str) -> Part:
    """Return the part about a sweep: its best settings, its headline metrics over the options, and all points."""
    points = sweep.points
    finished = points[points.status == "finished"]
    varied = [option for option in sweep.options if finished[option].nunique(dropna=False) > 1]
    table = frame_table(f"{name}-points", "One row per run, from points.csv.", points, THROUGHPUT, most=5 * MOST_ROWS)
    return Part(
        name,
        sweep.path.resolve().name,
        f"{len(finished[sweep.options].drop_duplicates()):,} settings{_best(finished, varied)}.",
        _sweep_plots(finished, varied),
        [Section("Every run", [table], closed=len(points) > 30)],
        record_section(sweep.record, f"{name}-record", "sweep.yaml"),
        warnings=status_warnings(sweep.record, "sweep.yaml") + failed_warnings(points) + busy_warnings(points, "point"),
    )


def _best(points: pd.DataFrame, options: Sequence[str]) -> str:
    """Return the settings with the best medians of the metrics that answer a comparison, if there are several settings."""
    said = []
    for metric in shown_in("answer") if options else ():
        if metric.name in points and points[metric.name].notna().any():
            medians = points.groupby(list(options), sort=False, dropna=False)[metric.name].median()
            best = int(medians.argmax() if metric.more_is_better else medians.argmin())
            most = "most" if metric.more_is_better else "least"
            value = f"{shown(float(medians.iloc[best]))} {metric.unit}"
            said.append(f"{most} {metric.label} with {setting(options, medians.index[best])} ({value})")
    return f": {'; '.join(said)}" if said else ""


def _sweep_plots(points: pd.DataFrame, options: Sequence[str]) -> list[Section]:
    """Return sections with the headline metrics over the numeric option with the most values, with one line per setting of
    the others. If these are too many lines for one plot, the option with the most values that fit makes the lines, and
    each setting of the rest is a section."""
    numeric = [name for name in options if pd.api.types.is_numeric_dtype(points[name]) and points[name].dtype != bool]
    along = max(numeric, key=lambda name: points[name].nunique(), default=None)
    others = [name for name in options if name != along]
    by_lines = others
    if others and len(points[others].drop_duplicates()) > MOST_LINES:
        fitting = [name for name in others if points[name].nunique() <= MOST_LINES]
        by_lines = [max(fitting, key=lambda name: points[name].nunique())] if fitting else []
    by_section = [name for name in others if name not in by_lines]
    groups = points.groupby(by_section, sort=False, dropna=False) if by_section else [((), points)]
    return [
        Section(
            setting(by_section, values) or "Metrics over the options",
            [
                Pictures(_sweep_pictures(of, along, by_lines)),
                Text("Medians over rounds; thin lines span the minimum to the maximum."),
            ],
            closed=number > 0,
        )
        for number, (values, of) in enumerate(groups)
        if len(of)
    ]


def _sweep_pictures(points: pd.DataFrame, along: str | None, by_lines: Sequence[str]) -> list[Picture]:
    pictures = []
    for metric in shown_in("report"):
        column, label, unit = metric.name, metric.title, metric.unit
        if column not in points or points[column].isna().all():
            continue
        known = points.dropna(subset=[column])
        groups = known.groupby(list(by_lines), sort=False, dropna=False) if by_lines else [((), known)]
        words = f"{label} in {unit} by {', '.join([*([along] if along else []), *by_lines]).replace('_', ' ')}"
        if along is None:
            bars = {setting(by_lines, values) or "all": Spread.of(of[column].tolist()) for values, of in groups}
            pictures.append(picture(draw_bars(label, metric.axis_label, bars), words, wide=False))
            continue
        lines = {
            setting(by_lines, values): {
                float(place): Spread.of(at[column].tolist())  # type: ignore[arg-type]
                for place, at in of.groupby(along)
            }
            for values, of in groups
        }
        pictures.append(
            picture(draw_lines(label, along.replace("_", " "), metric.axis_label, lines), words, wide=False)
        )
    return pictures
