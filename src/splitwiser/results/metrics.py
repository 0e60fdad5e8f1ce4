"""Computes the metrics of a run; :mod:`splitwiser.results.schema` declares their names and units."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from splitwiser.request import RequestMetrics, RequestOutput

Samples = Callable[[RequestMetrics], Sequence[float]]
"""What one request contributes to a latency's statistics, in milliseconds: one value, or one for each gap between tokens."""


@dataclass(frozen=True)
class Served:
    """The results of a run that its metrics are computed from: the outputs, the number of unanswered requests, the run's
    start by ``time.perf_counter_ns``, and the goodput targets in milliseconds, if any."""

    outputs: Sequence[RequestOutput]
    unanswered: int
    start_ns: int
    targets: Mapping[str, float] | None = None
    _pooled: dict[Samples, list[float]] = field(default_factory=dict, repr=False)

    @property
    def answers(self) -> list[RequestOutput]:
        """The outputs of requests that were not cancelled."""
        return [output for output in self.outputs if output.finish_reason != "cancelled"]

    def pool(self, samples: Samples) -> list[float]:
        """Return the ``samples`` of all outputs; they are computed once and then kept."""
        if samples not in self._pooled:
            self._pooled[samples] = [each for output in self.outputs for each in samples(output.metrics)]
        return self._pooled[samples]

    def rate(self, amount: float) -> float | None:
        """Return ``amount`` per second of the run; None for a run of no duration."""
        seconds = duration(self)
        return amount / seconds if seconds else None


def duration(run: Served) -> float:
    """Return the seconds from the run's start to the last token; 0 if there is none."""
    ends = (output.metrics.token_ns[-1] for output in run.outputs if output.metrics.token_ns)
    return (max(ends, default=run.start_ns) - run.start_ns) / 1e9


def completed(run: Served) -> int:
    """Return the number of requests that were answered."""
    return len(run.answers)


def cancelled(run: Served) -> int:
    """Return the number of requests that were cancelled."""
    return len(run.outputs) - len(run.answers)


def failed(run: Served) -> int:
    """Return the number of requests that were not answered."""
    return run.unanswered


def total_input_tokens(run: Served) -> int:
    """Return the number of prompt tokens of all answered requests."""
    return sum(len(output.prompt_token_ids) for output in run.answers)


def total_output_tokens(run: Served) -> int:
    """Return the number of generated tokens of all requests."""
    return sum(len(output.token_ids) for output in run.outputs)


def request_throughput(run: Served) -> float | None:
    """Return the answered requests per second."""
    return run.rate(completed(run))


def request_goodput(run: Served) -> float | None:
    """Return the requests per second that meet all targets (:func:`meets`); None without targets."""
    return run.rate(sum(meets(output.metrics, run.targets) for output in run.answers)) if run.targets else None


def requests_in_flight(run: Served) -> float | None:
    """Return how many requests were between their first token and their last, on average over the duration."""
    times = [output.metrics.token_ns for output in run.outputs if output.metrics.token_ns]
    return run.rate(sum(own[-1] - own[0] for own in times) / 1e9)


def full_batch_itl(run: Served) -> float | None:
    """Return the median time between two tokens of a request while every request was generating, in milliseconds: that of a
    step with all of them. None if there was no such time."""
    times = [output.metrics.token_ns for output in run.outputs]
    if not times or not all(times):
        return None
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    gaps = [after - before for own in times for before, after in pairwise(own) if begin <= before and after <= end]
    return float(np.median(gaps)) / 1e6 if gaps else None


def output_throughput(run: Served) -> float | None:
    """Return the generated tokens per second."""
    return run.rate(total_output_tokens(run))


def total_token_throughput(run: Served) -> float | None:
    """Return the prompt and generated tokens per second."""
    return run.rate(total_input_tokens(run) + total_output_tokens(run))


def ttft(metrics: RequestMetrics) -> list[float]:
    """Return the time to first token (TTFT) in ms, as a list of one; empty without a token."""
    return [metrics.ttft_ms] if metrics.token_ns else []


def tpot(metrics: RequestMetrics) -> list[float]:
    """Return the mean time per token after the first (TPOT) in ms, as a list of one; empty for a single token."""
    return [] if metrics.tpot_ms is None else [metrics.tpot_ms]


def itl(metrics: RequestMetrics) -> Sequence[float]:
    """Return every time between two consecutive tokens (ITL), in ms."""
    return metrics.itl_ms


def e2el(metrics: RequestMetrics) -> list[float]:
    """Return the time from arrival to the last token in ms, as a list of one; empty for a cancelled request."""
    return [metrics.e2el_ms] if metrics.cancelled_ns is None else []


def handoff(metrics: RequestMetrics) -> list[float]:
    """Return the time from the first token to the first decode step in ms, as a list of one; empty for a single token."""
    return [] if metrics.handoff_ms is None else [metrics.handoff_ms]


def statistic(name: str, values: Sequence[float]) -> float | None:
    """Return the ``mean``, ``median``, ``std`` (the population's) or a percentile such as ``p99`` (numpy's linear
    interpolation) of ``values``; None if there are none."""
    if not values:
        return None
    match name:
        case "mean":
            return float(np.mean(values))
        case "median":
            return float(np.median(values))
        case "std":
            return float(np.std(values))
        case _:
            return float(np.percentile(values, int(name[1:])))


def meets(metrics: RequestMetrics, targets: Mapping[str, float]) -> bool:
    """Return whether a request meets all ``targets`` (milliseconds by ``ttft``, ``tpot``, ``e2el``); a latency equal to its
    target meets it. A request of one token has a TPOT of 0 here, as in ``calculate_metrics`` of vLLM's
    benchmarks/serve.py."""
    return all((getattr(metrics, f"{name}_ms") or 0.0) <= limit for name, limit in targets.items())


def latency_row(output: RequestOutput, start_ns: int) -> dict[str, Any]:
    """Return one request's row of ``latency.csv``; columns in ``_s`` are seconds since ``start_ns``. Values that need
    two tokens are None for a single token, as are those that a cancelled request has not come to."""
    metrics = output.metrics
    begun = bool(metrics.token_ns)

    def seconds(moment_ns: int) -> float:
        return (moment_ns - start_ns) / 1e9

    gaps = metrics.itl_ms
    return {
        "request_id": output.request_id,
        "prompt_id": output.prompt_id,
        "sample": output.sample,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": metrics.cached_tokens,
        "output_tokens": len(output.token_ids),
        "preemptions": metrics.preemptions,
        "adapter": output.adapter,
        "priority": output.priority,
        "arrival_s": seconds(metrics.arrival_ns),
        "prefill_start_s": seconds(metrics.prefill_start_ns) if begun else None,
        "first_token_s": seconds(metrics.token_ns[0]) if begun else None,
        "finish_s": seconds(metrics.finish_ns),
        "queue_ms": metrics.queue_ms if begun else None,
        "ttft_ms": metrics.ttft_ms if begun else None,
        "handoff_ms": metrics.handoff_ms,
        "tpot_ms": metrics.tpot_ms,
        "itl_p50_ms": statistic("p50", gaps),
        "itl_p99_ms": statistic("p99", gaps),
        "e2el_ms": metrics.e2el_ms if metrics.cancelled_ns is None else None,
        "finish_reason": output.finish_reason,
        "prefill_worker": metrics.prefill_worker,
        "decode_worker": metrics.decode_worker,
    }
