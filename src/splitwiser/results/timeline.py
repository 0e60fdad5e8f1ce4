"""The timeline of a run: which worker was in which phase when, as a picture and as a trace for Perfetto."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitwiser.engine.messages import Phase, StepRecord

PHASE_COLOURS: dict[Phase, str] = {"prefill": "#d1495b", "decode": "#2e86ab"}


def step_row(step: StepRecord, start_ns: int) -> dict[str, Any]:
    """Return the row of ``steps.csv``, whose times count from ``start_ns``."""
    return {
        "worker": step.worker,
        "role": step.role,
        "phase": step.phase,
        "start_s": (step.start_ns - start_ns) / 1e9,
        "end_s": (step.end_ns - start_ns) / 1e9,
        "requests": step.requests,
        "tokens": step.tokens,
    }


def lanes(steps: Sequence[StepRecord]) -> list[tuple[str, Phase]]:
    """The (worker, phase) pairs that ran steps, in the order in which the timeline stacks them."""
    return sorted({(step.worker, step.phase) for step in steps}, key=lambda lane: (lane[1] == "decode", lane[0]))


def write_trace(path: Path, steps: Sequence[StepRecord], start_ns: int) -> None:
    """Write the steps in the trace event format (JSON array format, complete events, times in microseconds), which
    Perfetto and chrome://tracing open."""
    numbers = {lane: number for number, lane in enumerate(lanes(steps), start=1)}
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": f"{worker} {phase}"}}
        for (worker, phase), number in numbers.items()
    ]
    events += [
        {
            "name": step.phase,
            "ph": "X",
            "pid": 1,
            "tid": numbers[step.worker, step.phase],
            "ts": (step.start_ns - start_ns) / 1e3,
            "dur": (step.end_ns - step.start_ns) / 1e3,
            "args": {"requests": step.requests, "tokens": step.tokens, "role": step.role},
        }
        for step in steps
    ]
    path.write_text(json.dumps(events), encoding="utf-8")


def draw_timeline(path: Path, steps: Sequence[StepRecord], start_ns: int, title: str) -> None:
    """Draw a lane a worker and phase with a bar a step, and beneath how many requests each decode step took."""
    # not pyplot: a figure of its own needs no display and leaves the user's matplotlib settings alone
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = lanes(steps)
    figure = Figure(figsize=(11, 2.6 + 0.45 * max(1, len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    bars: Axes
    batch: Axes
    bars, batch = figure.subplots(2, 1, sharex=True, height_ratios=[max(1, len(rows)), 1.6])
    for row, lane in enumerate(rows):
        spans = [
            ((step.start_ns - start_ns) / 1e9, (step.end_ns - step.start_ns) / 1e9)
            for step in steps
            if (step.worker, step.phase) == lane
        ]
        bars.broken_barh(spans, (row - 0.38, 0.76), facecolors=PHASE_COLOURS[lane[1]], edgecolor="white", linewidth=0.2)
    bars.set_yticks(range(len(rows)), [f"{worker}\n{phase}" for worker, phase in rows])
    bars.set_ylim(len(rows) - 0.4, -0.6)
    bars.set_title(title, loc="left", fontsize=11, parse_math=False)
    for worker in sorted({step.worker for step in steps if step.phase == "decode"}):
        running = [step for step in steps if step.phase == "decode" and step.worker == worker]
        moments = [(step.start_ns - start_ns) / 1e9 for step in running]
        batch.step(moments, [step.requests for step in running], where="post", label=worker, linewidth=1.2)
    batch.set_ylabel("requests\nin a decode step")
    batch.set_xlabel("seconds from the run's start")
    batch.set_ylim(bottom=0)
    batch.yaxis.set_major_locator(MaxNLocator(integer=True))
    if batch.get_lines():
        batch.legend(loc="upper right", fontsize=8, frameon=False)
    for axes in (bars, batch):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.4, alpha=0.5)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
