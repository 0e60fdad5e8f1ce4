"""Draws arrival times and checks given ones."""

import math

import numpy as np

from splitwiser.errors import InputError

LONGEST_WAIT_S = 366 * 24 * 3600.0


def check_arrival(arrival_s: float, where: str) -> None:
    """Refuse an arrival time that a run cannot wait for. Raises :class:`InputError` with a message that begins with
    ``where``."""
    if not 0 <= arrival_s < math.inf:
        raise InputError(f"{where}: arrival_s must be 0 or more seconds, not {arrival_s}")
    if arrival_s > LONGEST_WAIT_S:
        raise InputError(
            f"{where}: arrives {arrival_s:g} s after the start, which is {arrival_s / LONGEST_WAIT_S:,.1f} years; "
            "arrival times are seconds from the start of the run"
        )


def gamma_arrivals(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Return the arrival times in seconds of ``count`` requests at ``rate`` per second, as in ``vllm bench serve``.

    Gaps, including the one before the first request, are drawn from a gamma distribution of shape ``burstiness`` and mean
    1 / ``rate``: 1 is a Poisson process, less is burstier (the gaps' coefficient of variation is burstiness ** -0.5),
    infinity is evenly spaced. The times are then scaled so that the last request arrives at exactly ``count / rate``:
    seeds change the pattern but not the load. With an infinite ``rate`` all requests arrive at once. Raises
    :class:`InputError` for a burstiness too small for floating point to draw from.
    """
    if math.isinf(rate):
        return [0.0] * count
    times = np.cumsum(np.ones(count) if math.isinf(burstiness) else rng.gamma(burstiness, 1 / burstiness, count))
    if not 0 < times[-1] < math.inf:
        raise InputError(f"--burstiness {burstiness:g}: too small to draw {count} gaps; give a larger value")
    return [float(moment) for moment in times * (count / rate / times[-1])]
