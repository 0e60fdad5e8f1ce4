"""Writes the timeline of a run, the steps of each worker and phase, as rows of ``steps.csv`` and as a Perfetto trace."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitwiser.engine.messages import StepPhase, StepRecord

PHASE_COLOURS: dict[StepPhase, str] = {"prefill": "#d1495b", "hybrid": "#8e5ea2", "decode": "#2e86ab"}


def step_row(step: StepRecord, start_ns: int) -> dict[str, Any]:
    """Return the row of ``steps.csv`` for ``step``; times are seconds since ``start_ns``."""
    return {
        "worker": step.worker,
        "role": step.role,
        "phase": step.phase,
        "start_s": (step.start_ns - start_ns) / 1e9,
        "end_s": (step.end_ns - start_ns) / 1e9,
        "requests": step.requests,
        "tokens": step.tokens,
        "decode_tokens": step.decode_tokens,
    }


def lanes(steps: Sequence[StepRecord]) -> list[tuple[str, StepPhase]]:
    """Return the (worker, phase) pairs that ran steps, in the order of the timeline from top to bottom."""
    order = list(PHASE_COLOURS)
    return sorted({(step.worker, step.phase) for step in steps}, key=lambda lane: (order.index(lane[1]), lane[0]))


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
            "args": {
                "requests": step.requests,
                "tokens": step.tokens,
                "decode_tokens": step.decode_tokens,
                "role": step.role,
            },
        }
        for step in steps
    ]
    path.write_text(json.dumps(events), encoding="utf-8")
