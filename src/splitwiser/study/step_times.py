"""Predicts the duration of a step from its size, by functions fitted to the rows of a profile.

**Prefill.** A step of chunks, each of ``n`` tokens after ``s`` earlier ones, takes

    a + b sum(n) + c chunks + d pairs(whole prompts) + e pairs(later chunks)

where ``pairs`` counts the positions attended to, ``n s + n (n + 1) / 2`` per chunk: ``a`` is the fixed cost of a step, ``b``
that of a token's matrix products, ``c`` and ``d`` of a prompt's attention, and ``e`` of attention that reads the pool.

**Decode.** For each batch size in the profile, a straight line in the total context; between two batch sizes, linear in
the batch at the same mean context; beyond the largest, extrapolated from the last two.

**Hybrid.** The tokens of ``batch`` requests in decode join the matrix products of a prefill step, and weights are read
once. So the products take as long as those of as many prompt tokens, or as long as reading the weights, whichever is longer
(the roofline model, by which Sarathi-Serve, arXiv 2403.02310, explains that decode tokens cost little beside a chunk).
Attention is that of both:

    max(a + b (sum(n) + batch), decode without context) + c, d and e as above + decode's time for its context

Coefficients are not negative and minimise the sum of squared *relative* errors, so that a short step counts as much as a
long one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from splitwiser.errors import InputError

Chunk = tuple[int, int]  # its earlier tokens, and its own
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class StepCosts:
    """Predicted seconds of a step. ``prefill_coefficients`` are a to e above; ``decode_lines`` are (batch, seconds without
    context, seconds per token of context), ascending."""

    prefill_coefficients: tuple[float, ...]
    decode_lines: tuple[tuple[int, float, float], ...]

    def prefill(self, chunks: Sequence[Chunk]) -> float:
        """Return the predicted seconds of a prefill step over ``chunks``."""
        return float(np.dot(self.prefill_coefficients, _prefill_features(chunks)))

    def decode(self, batch: int, context: float) -> float:
        """Return the predicted seconds of a decode step of ``batch`` requests that have ``context`` tokens in the pool
        together."""
        mean = context / batch
        moments = [(size, fixed + slope * mean * size) for size, fixed, slope in self.decode_lines]
        if len(moments) == 1 or batch <= moments[0][0]:
            return moments[0][1]
        above = next((place for place, (size, _) in enumerate(moments) if size >= batch), len(moments) - 1)
        (low, at_low), (high, at_high) = moments[above - 1], moments[above]
        return at_low + max(0.0, at_high - at_low) * (batch - low) / (high - low)

    def hybrid(self, chunks: Sequence[Chunk], batch: int, context: float) -> float:
        """Return the predicted seconds of a step over ``chunks`` and of ``batch`` requests in decode, as for
        :meth:`decode`."""
        fixed, per_token, *attention = self.prefill_coefficients
        _, tokens, *sizes = _prefill_features(chunks)
        without_context = self.decode(batch, 0)
        products = max(fixed + per_token * (tokens + batch), without_context)
        return products + float(np.dot(attention, sizes)) + self.decode(batch, context) - without_context


def fit_costs(prefill: pd.DataFrame, decode: pd.DataFrame) -> dict[int, StepCosts]:
    """Return the costs by thread count, from the rows of a profile's ``prefill.csv`` and ``decode.csv``.

    Raises :class:`InputError` if a thread count has rows of one phase only.
    """
    costs = {}
    for threads in sorted({*prefill["threads"], *decode["threads"]}):
        of_prefill, of_decode = (table[table["threads"] == threads] for table in (prefill, decode))
        if of_prefill.empty or of_decode.empty:
            raise InputError(f"the profile has no rows of one phase for {threads} threads; profile again")
        features = [
            _prefill_features([(int(start), int(tokens))] * int(prompts))
            for prompts, start, tokens in of_prefill[["prompts", "start_tokens", "prompt_tokens"]].to_numpy()
        ]
        coefficients = fit_non_negative(np.array(features), of_prefill["ms"].to_numpy(dtype=float) / 1e3)
        lines = []
        for batch, rows in of_decode.groupby("batch"):
            contexts = rows["context"].to_numpy(dtype=float) * int(str(batch))
            times = rows["ms"].to_numpy(dtype=float) / 1e3
            fixed, slope = fit_non_negative(np.stack([np.ones_like(contexts), contexts], axis=1), times)
            lines.append((int(str(batch)), float(fixed), float(slope)))
        costs[int(threads)] = StepCosts(tuple(map(float, coefficients)), tuple(lines))
    return costs


def nearest_costs(costs: Mapping[int, StepCosts], threads: int) -> StepCosts:
    """Return the costs for ``threads`` threads, or for the nearest profiled number."""
    return costs[min(costs, key=lambda count: (abs(count - threads), count))]


def fit_non_negative(features: Numbers, times: Numbers) -> Numbers:
    """Return the non-negative coefficients that minimise the squared relative errors of ``features @ coefficients`` (rows,
    features) against ``times`` (rows), by the algorithm of Lawson and Hanson (1974)."""
    from scipy.optimize import nnls  # slow to import, so not at start-up

    weighted = features / times[:, None]
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    coefficients, _ = nnls(weighted / scale, np.ones(len(times)))
    return np.asarray(coefficients / scale, dtype=float)


def _prefill_features(chunks: Sequence[Chunk]) -> list[float]:
    whole = sum(tokens * (tokens + 1) / 2 for start, tokens in chunks if not start)
    later = sum(tokens * start + tokens * (tokens + 1) / 2 for start, tokens in chunks if start)
    return [1.0, float(sum(tokens for _, tokens in chunks)), float(len(chunks)), whole, later]
