"""When requests arrive: at times drawn or given beforehand (open loop), or as others finish (closed loop)."""

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from splitwiser.errors import InputError
from splitwiser.request import Request

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


class Arrivals:
    """The requests of a run that are still to come, and the moments (of ``clock``) at which they do.

    Open loop: each request arrives at its ``arrival_s`` after ``start_ns``, however late the engine is. Closed loop
    (``max_concurrency`` given): that many arrive at the start and each further one, in order, the moment at which one
    finishes, as with so many users who each wait for their answer; ``arrival_s`` plays no part.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        start_ns: int,
        max_concurrency: int | None = None,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._clock = clock
        self._closed = max_concurrency is not None
        self._waiting = deque(requests)
        self._moments = [start_ns] * (max_concurrency or 0)  # a heap
        if not self._closed:
            self._waiting = deque(sorted(requests, key=lambda request: request.arrival_s))
            self._moments = [start_ns + int(request.arrival_s * 1e9) for request in self._waiting]

    @property
    def request_ids(self) -> list[int]:
        """Of the requests that have not come."""
        return [request.request_id for request in self._waiting]

    @property
    def next_ns(self) -> int | None:
        """When the next request arrives; None if none is to come, or none before one finishes."""
        return self._moments[0] if self._waiting and self._moments else None

    def due(self) -> Iterator[tuple[Request, int]]:
        """The requests that have arrived by now, each with its moment."""
        while self.next_ns is not None and self.next_ns <= self._clock():
            yield self._waiting.popleft(), heapq.heappop(self._moments)

    def finished(self, moment_ns: int) -> None:
        """A request finished at ``moment_ns``: in a closed loop the next one arrives then."""
        if self._closed:
            heapq.heappush(self._moments, moment_ns)
