"""The roofline picture of a profile: what each phase reaches, under what the machine could."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan, degrees
from pathlib import Path

from splitwiser.engine.messages import Phase
from splitwiser.results.timeline import PHASE_COLOURS
from splitwiser.study.ceilings import Ceilings

_MARKERS: dict[Phase, str] = {"prefill": "o", "decode": "s"}


@dataclass(frozen=True)
class RooflinePoint:
    """A measured step: its phase, the series it belongs to, a label (or none), operations a byte and operations a second."""

    phase: Phase
    series: str
    label: str
    intensity: float
    flops_per_s: float


def draw_roofline(path: Path, ceilings: Ceilings, points: Sequence[RooflinePoint], title: str) -> None:
    """Draw the two ceilings and the points on logarithmic axes; points of a series are joined."""
    # not pyplot: a figure of its own needs no display and leaves the user's matplotlib settings alone
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    intensities = [point.intensity for point in points] + [ceilings.ridge]
    left, right = min(intensities) / 2.5, max(intensities) * 2.5
    axes.plot(
        [left, ceilings.ridge, right],
        [each / 1e12 for each in map(ceilings.attainable, (left, ceilings.ridge, right))],
        color="#333333",
        linewidth=1.6,
    )
    axes.annotate(
        f"matrix product {_number(ceilings.flops_per_s / 1e12)} TFLOP/s", (ceilings.ridge, ceilings.flops_per_s / 1e12),
        xytext=(4, 6), textcoords="offset points", fontsize=9, color="#333333",
    )  # fmt: skip
    # along the line, which rises by bytes_per_s a byte
    axes.text(
        left * 1.08, ceilings.attainable(left * 1.08) / 1e12 * 1.2, f"memory {_number(ceilings.bytes_per_s / 1e9)} GB/s",
        rotation=degrees(atan(ceilings.bytes_per_s / 1e12)), rotation_mode="anchor", transform_rotates_text=True,
        fontsize=9, color="#333333",
    )  # fmt: skip
    labelled: set[Phase] = set()
    for name in dict.fromkeys(point.series for point in points):
        series = [point for point in points if point.series == name]
        phase = series[0].phase
        axes.plot(
            [point.intensity for point in series], [point.flops_per_s / 1e12 for point in series],
            color=PHASE_COLOURS[phase], marker=_MARKERS[phase], markersize=5, linewidth=0.9, alpha=0.9,
        )  # fmt: skip
        # a phase's first series is labelled below, the others above, since they often lie on one line
        place, side = ((-6, 5), "right") if phase in labelled else ((6, -10), "left")
        labelled.add(phase)
        for point in series:
            axes.annotate(
                point.label, (point.intensity, point.flops_per_s / 1e12),
                xytext=place, textcoords="offset points", ha=side, fontsize=8, color=PHASE_COLOURS[phase],
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("operations per byte of memory traffic, counted from the architecture")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    axes.legend(
        handles=[
            Line2D([], [], color=PHASE_COLOURS["prefill"], marker="o", label="prefill, by prompt tokens"),
            Line2D([], [], color=PHASE_COLOURS["decode"], marker="s", label="decode, by requests x context"),
        ],
        loc="lower right", fontsize=9, frameon=False,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
