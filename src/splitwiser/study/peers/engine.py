"""What the program needs of an engine. Like all modules of this package but ``run``, it is imported in a peer's environment
too, and so imports what that may lack only when an engine starts."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

KV_GIB = 4  # for K and V
STEP_TOKENS = 2048  # most tokens in a step: vLLM's own choice, and splitwiser's

Answer = tuple[int, list[int], list[int]]  # request number, token ids, time of each token (perf_counter_ns)


@dataclass(frozen=True)
class Asked:
    """What an engine is to serve: a checkpoint directory in a number format, requests of at most ``longest`` tokens, at most
    ``concurrency`` at a time. ``scratch`` is a folder for what an engine makes of the checkpoint, kept between its runs."""

    model: str
    dtype: str
    longest: int
    concurrency: int
    scratch: Path


class Engine(Protocol):
    """A started peer. ``began_s`` is the start of its loading by ``time.perf_counter``; ``version`` is its version with its
    settings (:func:`describe`)."""

    began_s: float
    version: str

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        """Add a request."""

    def collect(self) -> Iterator[Answer]:
        """Wait for a step or a short time; yields the completed answers."""

    def close(self) -> None:
        """End the engine's threads and processes."""


def describe(version: str, weights: str, kv: str, steps: str, threads: int, *more: str) -> str:
    """Return the version of an engine with its settings: the number formats of the weights and of K and V, what a step has
    at most, the number of threads that compute, and what else matters."""
    computing = f"{threads} thread{'' if threads == 1 else 's'}"
    return f"{version} ({', '.join([weights, f'K and V {kv}', steps, computing, *more])})"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
