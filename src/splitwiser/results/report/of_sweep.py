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
from splitwiser.results.report.plots import Spread, colours_of, draw_bars, draw_lines, shown
from splitwiser.results.schema import THROUGHPUT, shown_in


def sweep_part(sweep: Sweep, name: str) -> Part:
    """Return the part about a sweep: its best settings, its headline metrics over the options, and all points."""
    points = sweep.points
    finished = points[points.status == "finished"]
    count = len(finished[sweep.options].drop_duplicates())
    varied = [option for option in sweep.options if finished[option].nunique(dropna=False) > 1]
    table = frame_table(f"{name}-points", "One row per run, from points.csv.", points, THROUGHPUT, most=5 * MOST_ROWS)
    return Part(
        name,
        sweep.path.resolve().name,
        f"{count:,} setting{'s' * (count != 1)}{_best(finished, varied)}."
        if count
        else f"None of {len(points)} runs finished.",
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
    return [
        Section(
            name if by_section else "Metrics over the options",
            [
                Pictures(_sweep_pictures(of, along, by_lines)),
                Text("Medians over rounds; thin lines span the minimum to the maximum."),
            ],
            closed=number > 0,
        )
        for number, (name, of) in enumerate(_by_setting(points, by_section).items())
    ]


def _by_setting(points: pd.DataFrame, options: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return the rows of each setting of ``options`` by its name; without options or rows, all of them as one."""
    if not options or points.empty:
        return {"all": points}
    return {setting(options, values): of for values, of in points.groupby(list(options), sort=False, dropna=False)}


def _sweep_pictures(points: pd.DataFrame, along: str | None, by_lines: Sequence[str]) -> list[Picture]:
    pictures = []
    colours = colours_of(_by_setting(points, by_lines))
    for metric in shown_in("report"):
        if metric.name not in points or points[metric.name].isna().all():
            continue
        groups = _by_setting(points.dropna(subset=[metric.name]), by_lines)
        if along is None:
            bars = {name: Spread.of(of[metric.name].tolist()) for name, of in groups.items()}
            svg = draw_bars(metric.title, metric.axis_label, bars, colours)
        else:
            lines = {
                name: {
                    float(place): Spread.of(at[metric.name].tolist())  # type: ignore[arg-type]
                    for place, at in of.groupby(along)
                }
                for name, of in groups.items()
            }
            svg = draw_lines(metric.title, along.replace("_", " "), metric.axis_label, lines, colours)
        over = ", ".join([*([along] if along else []), *by_lines]).replace("_", " ")
        pictures.append(picture(svg, f"{metric.title} in {metric.unit} by {over}", wide=False))
    return pictures
