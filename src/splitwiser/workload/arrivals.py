"""Arrival times that are drawn, and whether those given are times that a run can wait for."""

import math

import numpy as np

from splitwiser.errors import InputError

LONGEST_WAIT_S = 366 * 24 * 3600.0


def check_arrival(arrival_s: float, where: str) -> None:
    """Raises :class:`InputError`, which begins with ``where``, unless ``arrival_s`` is a time that a run can wait for."""
    if not 0 <= arrival_s < math.inf:
        raise InputError(f"{where}: arrival_s must be 0 or more seconds, not {arrival_s}")
    if arrival_s > LONGEST_WAIT_S:
        raise InputError(
            f"{where}: arrives {arrival_s:g} s after the start, which is {arrival_s / LONGEST_WAIT_S:,.1f} years; "
            "arrival times are seconds from the start of the run"
        )


def gamma_arrivals(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Arrival times in seconds of ``count`` requests at ``rate`` a second, as ``vllm bench serve`` defines them.

    Gaps, the one before the first request too, are drawn from a gamma distribution of shape ``burstiness`` and mean
    1 / ``rate``: 1 is a Poisson process, less is burstier (the gaps' coefficient of variation is burstiness ** -0.5),
    infinity is a metronome. All are then scaled so that the last request arrives at exactly ``count / rate``, so seeds
    differ in the pattern and not in the load. An infinite ``rate`` is all at once. Raises :class:`InputError` for a
    burstiness too small for floating point to draw from.
    """
    if math.isinf(rate):
        return [0.0] * count
    times = np.cumsum(np.ones(count) if math.isinf(burstiness) else rng.gamma(burstiness, 1 / burstiness, count))
    if not 0 < times[-1] < math.inf:
        raise InputError(f"--burstiness {burstiness:g}: no {count} gaps can be drawn so; give a larger figure")
    return [float(moment) for moment in times * (count / rate / times[-1])]
