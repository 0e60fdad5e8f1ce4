"""Computes the activity of a run from its steps: busy times, overlap of the phases, token rates and inter-token gaps.

``steps`` and ``latency`` are the tables of a run's ``steps.csv`` and ``latency.csv``; times are in seconds of the run.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

FloatArray = npt.NDArray[np.float64]
SAME_MOMENT_S = 5e-10  # times are written to the nanosecond


def accumulated(steps: pd.DataFrame, amounts: FloatArray, moments: FloatArray) -> FloatArray:
    """Return the sum of ``amounts`` (one per step, spread evenly over its duration) up to each of ``moments``."""
    if steps.empty:
        return np.zeros(len(moments))
    starts, ends = _times(steps)
    ends = np.maximum(ends, starts + SAME_MOMENT_S)
    rates = amounts / (ends - starts)
    times = np.concatenate([starts, ends])
    order = np.argsort(times, kind="stable")
    level = np.cumsum(np.concatenate([rates, -rates])[order])
    total = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(times[order]))])
    return np.asarray(np.interp(moments, times[order], total), dtype=float)


def rates(steps: pd.DataFrame, amounts: FloatArray, edges: FloatArray) -> FloatArray:
    """Return ``amounts`` per second within each bin of ``edges``; for durations, the number of concurrent steps."""
    return np.asarray(np.diff(accumulated(steps, amounts, edges)) / np.diff(edges), dtype=float)


def durations(steps: pd.DataFrame) -> FloatArray:
    """Return the duration of each step in seconds."""
    starts, ends = _times(steps)
    return ends - starts


def span(steps: pd.DataFrame, latency: pd.DataFrame) -> float:
    """Return the seconds from the run's start to the end of its last step or its last token; 0 if it has neither."""
    moments = [float(column.max()) for column in (steps.end_s, latency.finish_s) if len(column)]
    return max(moments, default=0.0)


def decode_tokens(steps: pd.DataFrame) -> FloatArray:
    """Return the tokens of each step that are of requests in decode."""
    if "decode_tokens" in steps:
        return steps.decode_tokens.to_numpy(dtype=float)
    # a run of before there were hybrid steps
    return np.where(steps.phase == "decode", steps.tokens.to_numpy(dtype=float), 0.0)


@dataclass(frozen=True)
class Overlap:
    """Seconds during which prefill ran, decode ran, both ran, and either ran; a hybrid step runs both."""

    prefill_s: float
    decode_s: float
    both_s: float
    either_s: float


class PhaseActivity:
    """The phases that ran at each time of a run, as intervals between consecutive starts and ends of steps."""

    def __init__(self, steps: pd.DataFrame) -> None:
        starts, ends = _times(steps)
        self._edges = np.unique(np.concatenate([starts, ends]))
        middles = (self._edges[1:] + self._edges[:-1]) / 2
        running = {
            phase: np.searchsorted(np.sort(starts[of_phase]), middles)
            > np.searchsorted(np.sort(ends[of_phase]), middles)
            for phase in ("prefill", "decode")
            for of_phase in [steps.phase.isin((phase, "hybrid")).to_numpy()]
        }
        self._prefill, self._decode = running["prefill"], running["decode"]

    def overlap(self) -> Overlap:
        """Return the overlap of the phases over the whole run."""
        pieces = np.diff(self._edges)
        prefill, decode = self._prefill, self._decode
        chosen = (prefill, decode, prefill & decode, prefill | decode)
        return Overlap(*(float(pieces[each].sum()) for each in chosen))

    def busiest_window(self, length: float) -> tuple[float, float]:
        """Return (start, end) of the ``length`` seconds with the most overlap of the phases or, if they never overlap, the
        window that maximises the shorter of the two phases' times. Windows start at a start or end of a step."""
        if len(self._edges) < 2:
            return 0.0, length
        chosen = (self._prefill, self._decode, self._prefill & self._decode)
        prefill, decode, both = (self._within(each, length) for each in chosen)
        score = both if both.max() > 0 else np.minimum(prefill, decode)
        start = float(self._edges[int(np.argmax(score))])
        start = max(float(self._edges[0]), min(start, float(self._edges[-1]) - length))
        return start, start + length

    def _within(self, chosen: npt.NDArray[np.bool_], length: float) -> FloatArray:
        total = np.concatenate([[0.0], np.cumsum(np.diff(self._edges) * chosen)])
        return np.asarray(np.interp(self._edges + length, self._edges, total) - total, dtype=float)


def busy_seconds(steps: pd.DataFrame) -> pd.DataFrame:
    """Return one row per worker and phase: ``worker, phase, steps, busy_s, mean_step_ms, requests_per_step, tokens``."""
    rows = steps.assign(seconds=durations(steps)).groupby(["worker", "phase"], sort=True)
    table = rows.agg(
        steps=("seconds", "size"),
        busy_s=("seconds", "sum"),
        mean_step_ms=("seconds", "mean"),
        requests_per_step=("requests", "mean"),
        tokens=("tokens", "sum"),
    ).reset_index()
    return table.assign(mean_step_ms=table.mean_step_ms * 1e3)


def in_flight(latency: pd.DataFrame, moments: FloatArray) -> dict[str, npt.NDArray[np.int64]]:
    """Return the numbers of requests that are waiting, in prefill (up to the first token) and generating at ``moments``. One
    that was cancelled without a token waits until then."""
    passed = {
        column: np.searchsorted(
            np.sort(latency[column].fillna(latency.finish_s).to_numpy(dtype=float)), moments, side="right"
        )
        for column in ("arrival_s", "prefill_start_s", "first_token_s", "finish_s")
    }
    return {
        "waiting": passed["arrival_s"] - passed["prefill_start_s"],
        "in prefill": passed["prefill_start_s"] - passed["first_token_s"],
        "generating": passed["first_token_s"] - passed["finish_s"],
    }


def inter_token_gaps(steps: pd.DataFrame, latency: pd.DataFrame) -> FloatArray | None:
    """Return every gap between two consecutive tokens of a request, in ms; None if the files do not determine them.

    A request is in every step of its decode worker from its handoff to its end, and the time of a token is the end of its
    step. The gaps therefore follow from the steps if each request has as many steps as tokens after its first. If this
    check fails for one request (for example because a killed run lost rows), the result is None.
    """
    if "handoff_ms" not in latency or "decode_worker" not in latency:
        return None
    decode = steps[steps.phase.isin(("decode", "hybrid"))].sort_values("start_s", kind="stable")
    clocks = {worker: _times(rows) for worker, rows in decode.groupby("worker")}
    nothing = np.empty(0), np.empty(0)
    asked = latency[latency.output_tokens > 1]
    first_tokens = asked.first_token_s.to_numpy(dtype=float)
    begins = first_tokens + asked.handoff_ms.to_numpy(dtype=float) / 1e3 - SAME_MOMENT_S
    ends = asked.finish_s.to_numpy(dtype=float) + SAME_MOMENT_S
    pieces = []
    for worker, tokens, first_token, begin, end in zip(
        asked.decode_worker, asked.output_tokens, first_tokens, begins, ends, strict=True
    ):
        starts, made = clocks.get(worker, nothing)
        own = made[int(np.searchsorted(starts, begin)) : int(np.searchsorted(made, end))]
        if len(own) != tokens - 1:
            return None
        pieces.append(np.diff(own, prepend=first_token))
    return np.concatenate(pieces) * 1e3 if pieces else None


def _times(steps: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    return steps.start_s.to_numpy(dtype=float), steps.end_s.to_numpy(dtype=float)
