"""Draws the plots of results. Those of the report are SVG elements for an HTML page, with text as text and in the colours
of the page; the timeline of a run and the roofline of a profile are also PNG files."""

import hashlib
import itertools
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from splitwiser.engine.messages import Phase
from splitwiser.results.report.activity import FloatArray, decode_tokens, durations, in_flight, rates, span
from splitwiser.results.timeline import PHASE_COLOURS

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#9a7d0a")
"""The colour-blind safe palette of Okabe and Ito; black and yellow, invisible in one of the two themes, are replaced by grey
and ochre."""
STATES = {"waiting": "#a0a0a0", "in prefill": PHASE_COLOURS["prefill"], "generating": PHASE_COLOURS["decode"]}
MOST_BARS = 1500  # most steps of a timeline that are drawn one by one; more are drawn in bins
BINS = 300  # number of bins of a run's time
MOST_POINTS = 400  # of a distribution's curve
MARKED = (50, 99)  # percentiles with a dot on a distribution's curve

_WIDE, _SMALL = 11.0, 4.2  # inches
_MOST_LETTERS = 22  # in a line of a row's name
_CLOCK = "seconds from the run's start"
_PHASE_MARKERS: dict[Phase, str] = {"prefill": "o", "decode": "s"}
_WHOLE: dict[str, Any] = {"clip_on": False, "zorder": 3}  # for marks, which an axis through 0 would else cut
_INK, _FAINT = "#010203", "#010204"  # placeholders for the colours of the page
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "splitwiser",
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.35,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Spread:
    """The median, minimum and maximum of a bar or point."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of ``values``, at least one."""
        return cls(float(np.median(values)), float(min(values)), float(max(values)))


def draw_timeline(
    runs: Mapping[str, pd.DataFrame], window: tuple[float, float], *, titled: bool = False
) -> tuple[str, float | None]:
    """Draw the steps of each run within ``window`` (seconds), one lane per worker and phase, with the runs stacked on
    a common time axis.

    Returns the SVG and, if there are too many steps to draw each, the seconds of a bin: the height of a lane is then the
    share of the bin in which it was active. A step that is drawn individually shows its details on hover.
    """
    visible = {name: steps[(steps.end_s > window[0]) & (steps.start_s < window[1])] for name, steps in runs.items()}
    rows = [_height(steps) for steps in visible.values()]
    bin_s = _bin_s(visible.values(), window)
    tips: dict[str, list[str]] = {}
    with _figure(_WIDE, 1.0 + 0.42 * sum(rows) + 0.3 * len(runs), len(runs), rows) as (figure, panels):
        for number, (axes, (name, steps)) in enumerate(zip(panels, visible.items(), strict=True)):
            tips |= _draw_lanes(axes, steps, window, bin_s, f"steps-{number}")
            if titled:
                axes.set_title(name)
        panels[-1].set_xlabel(_CLOCK)
        _explain_phases(figure, visible.values())
        return _svg(figure, tips), bin_s


def save_timeline(path: Path, steps: pd.DataFrame, title: str) -> None:
    """Write the timeline of a whole run as a PNG: the lanes as in :func:`draw_timeline`, and below them the number of
    requests in each decode step."""
    window = (0.0, float(steps.end_s.max()) if len(steps) else 1.0)
    bin_s = _bin_s([steps], window)
    rows = _height(steps)
    with _figure(_WIDE, 2.6 + 0.45 * rows, 2, (rows, 1.6)) as (figure, (lanes, batches)):
        _draw_lanes(lanes, steps, window, bin_s, "steps")
        lanes.set_title(title)
        # a padded batch has requests that have ended too
        sized = steps.assign(batch=steps.requests.where(steps.phase == "decode", decode_tokens(steps)))
        for (worker, own), colour in zip(
            sized[sized.batch > 0].groupby("worker"), itertools.cycle(COLOURS), strict=False
        ):
            batches.step(own.start_s, own.batch, where="post", label=worker, color=colour, linewidth=1.2)
        batches.set_ylabel("requests\nin decode")
        batches.set_ylim(bottom=0)
        batches.yaxis.set_major_locator(MaxNLocator(integer=True))
        if batches.get_lines():
            batches.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=8, borderaxespad=0)
        height = "" if bin_s is None else f"; the height of a lane is its active share of each {shown(bin_s * 1e3)} ms"
        batches.set_xlabel(f"{_CLOCK}{height}")
        _explain_phases(figure, [steps])
        _save(figure, path)


def _explain_phases(figure: Figure, drawn: Iterable[pd.DataFrame]) -> None:
    """Write above the panels what the colours of the ``drawn`` steps mean."""
    phases = {str(phase) for steps in drawn for phase in steps.phase.unique()}
    handles = [Patch(color=colour, label=f"{phase} step") for phase, colour in PHASE_COLOURS.items() if phase in phases]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderaxespad=0)


def _height(steps: pd.DataFrame) -> int:
    return max(1, len(_lanes(steps)))


def _bin_s(runs: Iterable[pd.DataFrame], window: tuple[float, float]) -> float | None:
    """Return the seconds of a bin of ``window``, or None if the steps of ``runs`` are few enough to draw each."""
    return (window[1] - window[0]) / BINS if sum(map(len, runs)) > MOST_BARS else None


def _draw_lanes(
    axes: Axes, steps: pd.DataFrame, window: tuple[float, float], bin_s: float | None, name: str
) -> dict[str, list[str]]:
    """Draw a lane for each worker and phase; returns the hover texts of the bars by the id of their group."""
    tips = {}
    lanes = _lanes(steps)
    edges = np.linspace(*window, BINS + 1)
    for row, (worker, phase) in enumerate(lanes):
        own = steps[(steps.worker == worker) & (steps.phase == phase)]
        colour = _phase_colour(phase)
        if bin_s is not None:
            share = np.clip(rates(own, durations(own), edges), 0, 1)
            axes.stairs(row + 0.4 - 0.8 * share, edges, baseline=row + 0.4, fill=True, color=colour)
            continue
        starts, ends = (own[column].clip(*window) for column in ("start_s", "end_s"))
        spans = list(zip(starts, ends - starts, strict=True))
        bars = axes.broken_barh(spans, (row - 0.38, 0.76), facecolors=colour, edgecolor="none")
        bars.set_gid(f"{name}-{row}")
        tips[f"{name}-{row}"] = [_tip(step) for step in own.to_dict("records")]
    axes.set_yticks(range(len(lanes)), [f"{worker}\n{phase}" for worker, phase in lanes])
    axes.set_ylim(_height(steps) - 0.5, -0.5)
    axes.set_xlim(*window)
    axes.grid(axis="y", visible=False)
    return tips


def draw_progress(steps: pd.DataFrame, latency: pd.DataFrame) -> tuple[str, float]:
    """Draw the tokens per second of each phase over the run, and the requests waiting, in prefill and generating. Returns
    the SVG and the seconds of a bin."""
    edges = np.linspace(0, span(steps, latency) or 1.0, BINS // 2 + 1)
    with _figure(_WIDE, 5.2, 3) as (figure, (decode, prefill, requests)):
        of_decode = decode_tokens(steps)
        of_prefill = steps.tokens.to_numpy(dtype=float) - of_decode
        for axes, phase, tokens in ((decode, "decode", of_decode), (prefill, "prefill", of_prefill)):
            made = np.maximum(rates(steps, tokens, edges), 0)
            axes.stairs(made, edges, fill=True, color=_phase_colour(phase))
            axes.set_ylabel(f"{phase},\ntokens/s")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        states = in_flight(latency, edges[:-1])
        requests.stackplot(
            edges[:-1], *states.values(), labels=list(states), colors=list(STATES.values()), step="post", alpha=0.85
        )
        requests.set_ylabel("requests")
        requests.set_ylim(bottom=0)
        requests.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        requests.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)
        requests.set_xlim(0, edges[-1])
        requests.set_xlabel(_CLOCK)
        figure.align_ylabels()
        return _svg(figure), float(edges[1] - edges[0])


def draw_distributions(
    samples: Mapping[str, FloatArray], unit: str, title: str, colours: Mapping[str, str], *, log: bool = False
) -> str:
    """Draw the percentiles of each sample as a curve in its colour, with dots at those of :data:`MARKED`."""
    with _figure(_SMALL, 2.8 + _legend_height(samples)) as (figure, (axes,)):
        for name, values in samples.items():
            colour = colours[name]
            shares = np.linspace(0, 100, min(len(values), MOST_POINTS + 1))
            shares = np.union1d(shares, MARKED)  # so that the dots are points of the curve
            axes.plot(np.percentile(values, shares), shares, color=colour, linewidth=1.6, label=name)
            marked = np.percentile(values, MARKED)
            axes.plot(marked, MARKED, linestyle="none", marker="o", markersize=4, color=colour, **_WHOLE)
        axes.set_title(title)
        axes.set_ylim(-2, 102)
        axes.set_yticks([0, 25, 50, 75, 99], ["0", "25", "p50", "75", "p99"])
        axes.set_ylabel("share at or below, %")
        axes.set_xlabel(unit)
        least, greatest = (
            float(extreme([extreme(values) for values in samples.values()])) for extreme in (np.min, np.max)
        )
        if log and greatest > 8 * least > 0:
            axes.set_xscale("log")
            axes.set_xlim(least / 1.2, greatest * 1.2)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if greatest < 100 * least else (1,)))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.set_xlim(0, 1.05 * greatest or 1)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        _explain_lines(figure, samples)
        return _svg(figure)


def _explain_lines(figure: Figure, names: Collection[str]) -> None:
    """Write below the plot which of several lines is which."""
    if len(names) > 1:
        figure.legend(loc="outside lower center", ncols=_in_a_row(names))


def _legend_height(names: Collection[str]) -> float:
    """Return the inches that :func:`_explain_lines` needs in a small plot."""
    return 0.2 * math.ceil(len(names) / _in_a_row(names)) + 0.1 if len(names) > 1 else 0


def _in_a_row(names: Collection[str]) -> int:
    """Return how many of ``names`` fit beside each other below a small plot, at most 3."""
    return max(1, min(3, 62 // (7 + max(map(len, names)))))


def draw_bars(
    title: str,
    axis_label: str,
    values: Mapping[str, Spread],
    colours: Mapping[str, str],
    remarks: Mapping[str, str] | None = None,
) -> str:
    """Draw one bar per name in its colour: the median, a line from the minimum to the maximum, and the median as a number
    beside it. ``remarks`` are written below the names."""
    labels = [f"{_wrapped(name)}\n{(remarks or {}).get(name, '')}".strip() for name in values]
    with _rows(title, axis_label, labels) as (figure, axes):
        rows = range(len(values))
        axes.barh(
            rows, [each.median for each in values.values()], height=0.62, color=[colours[name] for name in values]
        )
        for row, each in zip(rows, values.values(), strict=True):
            if each.least < each.greatest:
                axes.plot([each.least, each.greatest], [row, row], color=_INK, linewidth=1.2)
            _write_beside(axes, shown(each.median), each.greatest, row)
        _leave_room(axes, [each.greatest for each in values.values()], 1.3)
        return _svg(figure)


def draw_predictions(title: str, unit: str, values: Mapping[str, tuple[float, float]]) -> str:
    """Draw one row per name: what was predicted (an open circle) and what was measured (a dot), joined by a line, and the
    error of the prediction in words. ``values`` are (predicted, measured)."""
    with _rows(title, unit, [_wrapped(name) for name in values]) as (figure, axes):
        rows = range(len(values))
        predicted, measured = ([pair[place] for pair in values.values()] for place in (0, 1))
        axes.hlines(rows, predicted, measured, color=_FAINT, linewidth=1.4)
        dots: dict[str, Any] = {"linestyle": "none", "marker": "o", **_WHOLE}
        axes.plot(measured, rows, label="measured", markersize=7, color=COLOURS[0], **dots)
        axes.plot(
            predicted, rows, label="predicted", markersize=9, markerfacecolor="none", markeredgecolor=COLOURS[5],
            markeredgewidth=1.6, **dots,
        )  # fmt: skip
        for row, (before, after) in zip(rows, values.values(), strict=True):
            _write_beside(axes, error_in_words(before / after - 1), max(before, after), row)
        _leave_room(axes, [*predicted, *measured], 1.65)
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure)


def error_in_words(error: float) -> str:
    """Return the relative error of a prediction in words, such as ``12% too high``."""
    if abs(error) < 0.005:
        return "as measured"
    return f"{abs(error):.0%} too {'high' if error > 0 else 'low'}"


@contextmanager
def _rows(title: str, axis_label: str, labels: Sequence[str]) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure whose rows, from top to bottom, have ``labels``."""
    lines = sum(max(label.count("\n") + 1, 1.7) for label in labels)
    with _figure(_SMALL, 0.85 + 0.2 * lines) as (figure, (axes,)):
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
        axes.set_xlabel(axis_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        yield figure, axes


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name, _MOST_LETTERS)) or name


def _write_beside(axes: Axes, text: str, place: float, row: int) -> None:
    axes.annotate(text, (place, row), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)


def _leave_room(axes: Axes, values: Sequence[float], factor: float) -> None:
    """Begin the x axis at 0 and end it where the texts beside the largest of ``values`` fit."""
    axes.set_xlim(0, factor * (max(values, default=0) or 1))


def draw_lines(
    title: str, along: str, axis_label: str, lines: Mapping[str, Mapping[float, Spread]], colours: Mapping[str, str]
) -> str:
    """Draw one line per name in its colour over a numeric option: medians, with vertical lines from the minimum to the
    maximum."""
    markers = dict(zip(colours, itertools.cycle("osD^vP*X"), strict=False))
    with _figure(_SMALL, 2.8 + _legend_height(lines)) as (figure, (axes,)):
        for name, points in lines.items():
            colour, marker = colours[name], markers[name]
            places = sorted(points)
            axes.plot(
                places, [points[place].median for place in places],
                color=colour, marker=marker, markersize=5, linewidth=1.6, label=name, **_WHOLE,
            )  # fmt: skip
            for place in places:
                axes.plot([place, place], [points[place].least, points[place].greatest], color=colour, linewidth=1.1)
        places = sorted({place for points in lines.values() for place in points})
        if len(places) > 1 and places[0] > 0 and places[-1] / places[0] >= 8:
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
        if len(places) <= 10:
            axes.set_xticks(places, [shown(place) for place in places])
        axes.set_ylim(0, 1.06 * max(spread.greatest for points in lines.values() for spread in points.values()) or 1)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.set_title(title)
        axes.set_xlabel(along)
        axes.set_ylabel(axis_label)
        _explain_lines(figure, lines)
        return _svg(figure)


def draw_roofline(points: pd.DataFrame, tera_flops: float, giga_bytes: float) -> str:
    """Draw measured steps (``phase, label, arithmetic_intensity, tflops``) under the measured ceilings of compute, in
    TFLOP/s, and of memory, in GB/s. A mark shows its step on hover."""
    with _figure(_WIDE, 5.4) as (figure, (axes,)):
        _draw_ceilings(axes, points, tera_flops, giga_bytes)
        tips = {}
        for phase, marker in _PHASE_MARKERS.items():
            own = points[points.phase == phase]
            drawn = axes.scatter(
                own.arithmetic_intensity, own.tflops, s=34, marker=marker, alpha=0.85, label=phase,
                color=PHASE_COLOURS[phase],
            )  # fmt: skip
            drawn.set_gid(f"roofline-{phase}")
            tips[f"roofline-{phase}"] = [
                f"{step['label']}: {shown(step['tflops'])} TFLOP/s at {shown(step['arithmetic_intensity'])} operations/byte"
                for step in own.to_dict("records")
            ]
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure, tips)


def save_roofline(path: Path, points: pd.DataFrame, tera_flops: float, giga_bytes: float, title: str) -> None:
    """Write the roofline as a PNG: as :func:`draw_roofline`, with a ``label`` beside each mark and lines that connect the
    marks of a ``series``."""
    with _figure(9.0, 5.4) as (figure, (axes,)):
        _draw_ceilings(axes, points, tera_flops, giga_bytes)
        axes.set_title(title)
        for phase, marker in _PHASE_MARKERS.items():
            of_phase = points[points.phase == phase]
            for number, (_, own) in enumerate(of_phase.groupby("series", sort=False)):
                axes.plot(
                    own.arithmetic_intensity, own.tflops,
                    color=PHASE_COLOURS[phase], marker=marker, markersize=5, linewidth=0.9, alpha=0.9,
                )  # fmt: skip
                # a phase's first series is labelled below, the others above, since they often lie on one line
                place, side = ((-6, 5), "right") if number else ((6, -10), "left")
                for label, *at in own[["label", "arithmetic_intensity", "tflops"]].itertuples(index=False):
                    axes.annotate(
                        label, (at[0], at[1]),
                        xytext=place, textcoords="offset points", ha=side, fontsize=8, color=PHASE_COLOURS[phase],
                        path_effects=[withStroke(linewidth=2.5, foreground="white")],
                    )  # fmt: skip
        series = {"prefill": "prefill, by prompt tokens", "decode": "decode, by requests x context"}
        handles = [
            Line2D([], [], color=PHASE_COLOURS[phase], marker=marker, label=series[phase])
            for phase, marker in _PHASE_MARKERS.items()
        ]
        figure.legend(handles=[*axes.get_lines()[:1], *handles], loc="outside lower center", ncols=3)
        _save(figure, path)


def _draw_ceilings(axes: Axes, points: pd.DataFrame, tera_flops: float, giga_bytes: float) -> None:
    """Draw the two ceilings, with their rates as the label, on logarithmic axes that contain ``points``."""
    ridge = tera_flops * 1e3 / giga_bytes
    left = min(points.arithmetic_intensity.min(), ridge) / 2
    right = max(points.arithmetic_intensity.max(), ridge) * 2
    label = f"measured ceiling: memory {shown(giga_bytes)} GB/s, compute {shown(tera_flops)} TFLOP/s"
    axes.plot(
        [left, ridge, right], [left * giga_bytes / 1e3, tera_flops, tera_flops], color=_INK, linewidth=1.4, label=label
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("operations per byte of memory traffic, counted from the architecture")
    axes.set_ylabel("operations per second, TFLOP/s")


def shown(value: float) -> str:
    """Return ``value`` rounded for the report: integers as they are, else 1 decimal from 100, 2 from 1, 3 digits below."""
    if value == int(value):
        return f"{value:,.0f}"
    size = abs(value)
    return f"{value:,.1f}" if size >= 99.95 else f"{value:.2f}" if size >= 0.995 else f"{value:.3g}"


def _lanes(steps: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the (worker, phase) pairs of ``steps``, prefill first and decode last."""
    pairs = {(str(worker), str(phase)) for worker, phase in zip(steps.worker, steps.phase, strict=True)}
    return sorted(pairs, key=lambda lane: (lane[1] == "decode", lane[1] == "hybrid", lane[0]))


def _phase_colour(phase: str) -> str:
    return next((colour for known, colour in PHASE_COLOURS.items() if known == phase), PHASE_COLOURS["prefill"])


def _tip(step: Mapping[Any, object]) -> str:
    start, end = (float(str(step[column])) for column in ("start_s", "end_s"))
    of_decode = f" ({step['decode_tokens']} of decode)" if step["phase"] == "hybrid" else ""
    return (
        f"{step['worker']} {step['phase']}: {step['requests']} requests, {step['tokens']} tokens{of_decode}, "
        f"{start:.4f} to {end:.4f} s ({shown((end - start) * 1e3)} ms)"
    )


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each of ``names``, for all pictures that show some of them; after the eighth they repeat."""
    return dict(zip(names, itertools.cycle(COLOURS), strict=False))


@contextmanager
def _figure(
    width: float, height: float, rows: int = 1, height_ratios: Sequence[float] | None = None
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure and its panels, stacked on a shared x axis."""
    # not pyplot: this needs no display and does not change the user's matplotlib settings
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True, height_ratios=height_ratios)[:, 0])


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=130, facecolor="white")


def _svg(figure: Figure, tips: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return ``figure`` as an SVG element for a page, with coordinates rounded to 0.01 points, the page's colours and font,
    and ids unique on the page. ``tips`` are the hover texts of each mark of a group."""
    file = StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r"font-family: [^;]*; ", "", text[text.index("<svg") :])
    text = text.replace(_INK, "currentColor").replace(_FAINT, "var(--faint)")
    prefix = f"p{hashlib.sha256(text.encode()).hexdigest()[:10]}-"
    used = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", text))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(re.sub(r"(url\(|href=\")#", rf"\1#{prefix}", text))
    for group in root.iter(f"{{{_SVG}}}g"):
        _add_tips(group, (tips or {}).get(group.get("id", ""), []))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name is not None and name in used:
            element.set("id", prefix + name)
        if element.tag not in (f"{{{_SVG}}}text", f"{{{_SVG}}}tspan", f"{{{_SVG}}}title"):
            element.text = None
        element.tail = None
        for attribute in ("d", "x", "y", "transform"):
            if attribute in element.attrib:
                hundredths = re.sub(r"(\.\d\d)\d+", r"\1", element.attrib[attribute])
                element.set(attribute, " ".join(hundredths.split()))
    for parent in list(root.iter(f"{{{_SVG}}}defs")):
        for style in parent.findall(f"{{{_SVG}}}style"):
            parent.remove(style)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    return ElementTree.tostring(root, encoding="unicode")


def _add_tips(group: ElementTree.Element, tips: Sequence[str]) -> None:
    marks = [child for child in group if child.tag == f"{{{_SVG}}}path"]
    marks += group.findall(f"{{{_SVG}}}g/{{{_SVG}}}use")
    if len(marks) == len(tips):  # else some lie outside of the picture, and which is not told
        for mark, tip in zip(marks, tips, strict=True):
            ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = tip
