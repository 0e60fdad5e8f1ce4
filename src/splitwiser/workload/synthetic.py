"""Draws synthetic requests: lengths from a distribution, and prompts of random token ids."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from splitwiser.errors import InputError

SPELLINGS = "a number, uniform:LOW:HIGH, normal:MEAN:STD or lognormal:MEAN:STD"
LONGEST = 10**9  # tokens; beyond the positions of any model, so longer draws are cut to this


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts; ``first`` and ``second`` are its low and high (both included), or mean and standard
    deviation of the lengths themselves (not of their logarithms)."""

    kind: str
    first: float
    second: float

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """Return ``count`` lengths, rounded, each at least 1."""
        values: np.ndarray
        match self.kind:
            case "uniform":
                values = rng.integers(int(self.first), int(self.second), size=count, endpoint=True)
            case "normal":
                values = rng.normal(self.first, self.second, count)
            case _:
                variance = math.log1p((self.second / self.first) ** 2)
                values = rng.lognormal(math.log(self.first) - variance / 2, math.sqrt(variance), count)
        return [int(value) for value in np.clip(np.rint(values), 1, LONGEST)]


def parse_lengths(option: str, text: str) -> Lengths:
    """Read ``text``, the value of ``option``: 512, uniform:LOW:HIGH, normal:MEAN:STD or lognormal:MEAN:STD.

    Raises :class:`InputError` naming the option.
    """
    kind, *parts = text.split(":")
    if not parts:
        kind, parts = "uniform", [kind, kind]
    try:
        first, second = map(float, parts)
    except ValueError:
        kind = ""
    if kind not in ("uniform", "normal", "lognormal"):
        raise InputError(f"{option} '{text}': must be {SPELLINGS}, in tokens")
    if kind == "uniform":
        right = 1 <= first <= second <= LONGEST and first.is_integer() and second.is_integer()
        rule = "whole numbers with 1 <= LOW <= HIGH" if len(text.split(":")) > 1 else "a whole number of 1 or more"
    else:
        right = 1 <= first <= LONGEST and 0 <= second <= LONGEST
        rule = "MEAN 1 or more and STD 0 or more"
    if not right:
        raise InputError(f"{option} '{text}': must be {rule}, in tokens")
    return Lengths(kind, first, second)


def random_prompts(
    lengths: Sequence[int], vocabulary: int, avoided: Collection[int], rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Return a prompt of each length: token ids drawn uniformly from 0 to ``vocabulary`` - 1 except the ``avoided``."""
    ids = np.setdiff1d(np.arange(vocabulary), np.fromiter(avoided, dtype=np.int64, count=len(avoided)))
    return [tuple(ids[rng.integers(len(ids), size=length)].tolist()) for length in lengths]
