"""Trials of what is faster, at load. On a processor that has AMX's tiles, this project's functions can compute with tiles or
with dot products, and PyTorch may be faster than either; where weights can be compressed, products may be faster without.
Outcomes are remembered, so that all processes of a run choose alike."""

import ctypes
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from splitwiser.machine.remembered import Remembered
from splitwiser.model.kernels.build import processor_kind

TRIED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # of a product's inputs
ALL_ROWS = 1 << 62  # as a number of rows that no product has
SETTINGS = ("DNNL_", "ONEDNN_")  # of the environment: what PyTorch's products depend on

_ROUNDS = 4


def remembered_trial(library: ctypes.CDLL, name: str, find: Callable[[], object]) -> object:
    """Return what ``find`` returns, made of JSON's types, or what it has returned in an earlier process on this machine."""
    settings = sorted((key, value) for key, value in os.environ.items() if key.startswith(SETTINGS))
    sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(__file__).parent.glob("*.py"))]
    trial = Remembered((name, library._name, sources, torch.__version__, processor_kind(), settings))
    if trial.outcome is None:
        trial.outcome = find()
        trial.remember(trial.outcome)
    return trial.outcome


def best_seconds(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least time that each of ``candidates`` took, run in turn, after one run that does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(1 + _ROUNDS):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: min(taken[1:]) for name, taken in times.items()}


def last_row_count(times: Mapping[int, Mapping[str, float]], wins: Callable[[Mapping[str, float]], bool]) -> int:
    """Return the largest number of rows in ``times`` up to which ``wins`` holds for the times of every number; 0 if it does
    not for the least."""
    last = 0
    for rows in sorted(times):
        if not wins(times[rows]):
            break
        last = rows
    return last


def rows_by_dots(times: Mapping[int, Mapping[str, float]]) -> int:
    """Return up to how many rows ``dots`` took no longer than ``tiles``; :data:`ALL_ROWS` if that holds for all that were
    tried."""
    rows = last_row_count(times, lambda each: each["dots"] <= each["tiles"])
    return ALL_ROWS if rows == max(times) else rows
