"""Measures capacity, the rate of answers when all requests arrive at once, and sets arrivals to a fraction of it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from splitwiser.config import RunConfig
from splitwiser.errors import InputError, RunError
from splitwiser.study.fresh_runs import Execute, RoundsBar, run_once


def check_load(load: float, config: RunConfig) -> None:
    """Raise :class:`InputError` unless requests of ``config`` can arrive at the fraction ``load`` of their capacity."""
    if not 0 < load < math.inf:
        raise InputError(f"--load must be above 0, such as 0.6, not {load:g}")
    for name in ("request_rate", "max_concurrency"):
        if getattr(config, name) is not None:
            raise InputError(f"a load sets when requests arrive; leave --{name} out")
    replace(config, request_rate=math.inf)  # raises if the workload does not allow a rate


def measure_capacity(
    name: str, options: Mapping[str, Any], folder: Path, label: str, bar: RoundsBar, execute: Execute | None
) -> float:
    """Return the requests per second that a run with ``options`` answers when all arrive at once. ``name`` is the variant's
    name; the other arguments are as for :func:`~splitwiser.study.fresh_runs.run_once`. Raises :class:`RunError` if the run
    fails."""
    bar.begin(f"capacity of {name}")
    outcome = run_once({**options, "request_rate": math.inf}, folder, label, bar.show, execute)
    bar.end(outcome)
    if outcome.status == "failed":
        raise RunError(f"the run that measures the capacity of {name} failed: {outcome.error}; see {folder}")
    capacity = float(outcome.figures["request_throughput"])
    tqdm.write(f"capacity of {name}: {capacity:.4g} requests/s when all arrive at once")
    return capacity


def rate_at(load: float, capacity: float) -> float:
    """Return the fraction ``load`` of ``capacity`` in requests per second, rounded to four digits."""
    return float(f"{load * capacity:.4g}")
