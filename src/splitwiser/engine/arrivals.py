"""When requests arrive: at times given beforehand (open loop), or as others finish (closed loop)."""

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from splitwiser.request import Request


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
