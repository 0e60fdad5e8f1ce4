"""Arrival of requests: at given times (open loop), or whenever another request finishes (closed loop)."""

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from splitwiser.request import Request


class Arrivals:
    """The requests of a run that have not arrived yet, and their arrival times by ``clock``, in nanoseconds.

    Open loop: each request arrives ``arrival_s`` seconds after ``start_ns``, however late the engine is. Closed loop
    (``max_concurrency`` given): ``max_concurrency`` requests arrive at the start and each further one, in order, when
    another finishes, like that many users who each wait for their answer; ``arrival_s`` is ignored.
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
        self._times_ns = [start_ns] * (max_concurrency or 0)  # a heap
        if not self._closed:
            self._waiting = deque(sorted(requests, key=lambda request: request.arrival_s))
            self._times_ns = [start_ns + int(request.arrival_s * 1e9) for request in self._waiting]

    @property
    def request_ids(self) -> list[int]:
        """Ids of the requests that have not arrived yet."""
        return [request.request_id for request in self._waiting]

    @property
    def next_ns(self) -> int | None:
        """Arrival time of the next request; None if no request is left, or if the next one waits for another to finish."""
        return self._times_ns[0] if self._waiting and self._times_ns else None

    def due(self) -> Iterator[tuple[Request, int]]:
        """Yield each request that has arrived by now, with its arrival time in nanoseconds."""
        while self.next_ns is not None and self.next_ns <= self._clock():
            yield self._waiting.popleft(), heapq.heappop(self._times_ns)

    def remove(self, request_id: int) -> Request | None:
        """Remove the request with ``request_id`` and return it; None if it has arrived or there is none."""
        for place, request in enumerate(self._waiting):
            if request.request_id == request_id:
                del self._waiting[place]
                if not self._closed:
                    self._times_ns.sort()  # in the order of the requests, and still a heap
                    del self._times_ns[place]
                return request
        return None

    def record_finish(self, finish_ns: int) -> None:
        """Note that a request finished at ``finish_ns``: in a closed loop the next one arrives then."""
        if self._closed:
            heapq.heappush(self._times_ns, finish_ns)
