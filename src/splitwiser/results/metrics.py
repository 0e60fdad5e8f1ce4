"""The figures of a run: a row of ``latency.csv`` a request, a row of ``throughput.csv`` a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from splitwiser.errors import InputError, unknown
from splitwiser.request import RequestMetrics, RequestOutput

LATENCY_COLUMNS = (
    "request_id", "prompt_tokens", "output_tokens", "arrival_s", "prefill_start_s", "first_token_s", "finish_s",
    "queue_ms", "ttft_ms", "handoff_ms", "tpot_ms", "itl_p50_ms", "itl_p99_ms", "e2el_ms", "finish_reason",
    "prefill_worker", "decode_worker",
)  # fmt: skip
STATISTICS = ("mean", "median", "std", "p90", "p99")
TARGETS = ("ttft", "tpot", "e2el")  # what goodput may ask of a request
METRICS = ("ttft", "tpot", "itl", "e2el", "handoff")


def latency_row(output: RequestOutput, start_ns: int) -> dict[str, Any]:
    """One request's row; times in ``_s`` count from ``start_ns``. Figures between tokens are None for a single token."""
    metrics = output.metrics

    def seconds(moment_ns: int) -> float:
        return (moment_ns - start_ns) / 1e9

    gaps = metrics.itl_ms
    return {
        "request_id": output.request_id,
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": len(output.token_ids),
        "arrival_s": seconds(metrics.arrival_ns),
        "prefill_start_s": seconds(metrics.prefill_start_ns),
        "first_token_s": seconds(metrics.token_ns[0]),
        "finish_s": seconds(metrics.token_ns[-1]),
        "queue_ms": metrics.queue_ms,
        "ttft_ms": metrics.ttft_ms,
        "handoff_ms": metrics.handoff_ms,
        "tpot_ms": metrics.tpot_ms,
        "itl_p50_ms": float(np.percentile(gaps, 50)) if gaps else None,
        "itl_p99_ms": float(np.percentile(gaps, 99)) if gaps else None,
        "e2el_ms": metrics.e2el_ms,
        "finish_reason": output.finish_reason,
        "prefill_worker": metrics.prefill_worker,
        "decode_worker": metrics.decode_worker,
    }


def parse_goodput(text: str) -> dict[str, float]:
    """Read targets such as ``ttft:200,tpot:50,e2el:5000`` (milliseconds; any of the three; a comma or a space between).

    Raises :class:`InputError`.
    """
    targets: dict[str, float] = {}
    for part in text.replace(",", " ").split():
        name, _, limit = part.partition(":")
        if name not in TARGETS:
            raise unknown("target of --goodput", name, TARGETS)
        if name in targets:
            raise InputError(f"--goodput '{text}': {name} is given twice")
        try:
            targets[name] = float(limit)
        except ValueError:
            targets[name] = -1.0
        if not targets[name] >= 0:
            raise InputError(f"--goodput '{text}': {name} must be 0 or more milliseconds, such as {name}:200")
    if not targets:
        raise InputError("--goodput: needs at least one target, such as ttft:200,tpot:50,e2el:5000")
    return targets


def meets(metrics: RequestMetrics, targets: Mapping[str, float]) -> bool:
    """Whether a request is within all ``targets`` (milliseconds by ``ttft``, ``tpot``, ``e2el``), a figure equal to its
    target included. A request of one token has a TPOT of 0 here, as in ``calculate_metrics`` of vLLM's benchmarks/serve.py.
    """
    figures = {"ttft": metrics.ttft_ms, "tpot": metrics.tpot_ms or 0.0, "e2el": metrics.e2el_ms}
    return all(figures[name] <= target for name, target in targets.items())


def throughput_figures(
    outputs: Sequence[RequestOutput], failed: int, start_ns: int, targets: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The run's figures, named as ``vllm bench serve`` names them.

    ``duration`` runs from ``start_ns`` to the last token, in seconds; throughputs are per second of it. Percentiles of
    TTFT, TPOT and E2E are over requests, those of ITL over every gap of every request (numpy's linear interpolation;
    the standard deviation is the population's). ``request_goodput`` counts the requests that meet all ``targets``
    (:func:`meets`); None without targets. A figure of nothing is None.
    """
    end_ns = max((output.metrics.token_ns[-1] for output in outputs), default=start_ns)
    duration = (end_ns - start_ns) / 1e9
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = sum(len(output.token_ids) for output in outputs)

    def rate(amount: int) -> float | None:
        return amount / duration if duration else None

    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(outputs),
        "failed": failed,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": rate(len(outputs)),
        "request_goodput": rate(sum(meets(output.metrics, targets) for output in outputs)) if targets else None,
        "output_throughput": rate(output_tokens),
        "total_token_throughput": rate(prompt_tokens + output_tokens),
    }
    samples = {
        "ttft": [output.metrics.ttft_ms for output in outputs],
        "tpot": [output.metrics.tpot_ms for output in outputs if output.metrics.tpot_ms is not None],
        "itl": [gap for output in outputs for gap in output.metrics.itl_ms],
        "e2el": [output.metrics.e2el_ms for output in outputs],
        "handoff": [output.metrics.handoff_ms for output in outputs if output.metrics.handoff_ms is not None],
    }
    for metric in METRICS:
        for statistic in STATISTICS:
            figures[f"{statistic}_{metric}_ms"] = _statistic(statistic, samples[metric])
    return figures


def _statistic(statistic: str, values: Sequence[float]) -> float | None:
    if not values:
        return None
    match statistic:
        case "mean":
            return float(np.mean(values))
        case "median":
            return float(np.median(values))
        case "std":
            return float(np.std(values))
        case _:
            return float(np.percentile(values, int(statistic[1:])))
