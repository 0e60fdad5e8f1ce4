"""Policies that rank requests: the lowest rank first, with ageing so that nobody starves."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from annotated_types import Ge, Gt

from splitwiser import constants
from splitwiser.engine.policy import PendingPrompt, WaitingRequest, pack_in_order
from splitwiser.formats import must_be

W = TypeVar("W", bound=WaitingRequest)


@dataclass(frozen=True)
class Ranked(ABC):
    """Admits and prefills the requests of the lowest :meth:`rank` first, and of those the one that arrived first.

    A request that has waited ``ageing_s`` seconds goes before all that have not, and those that have go in order of arrival.
    So nobody overtakes a request that arrived ``ageing_s`` or more before, however many better ones keep coming: 0 is first
    come, first served, and ``inf`` is the order of ranks alone, under which a request may wait for ever.
    """

    ageing_s: Annotated[float, Ge(0), must_be("0 or more seconds")] = constants.AGEING_S

    @abstractmethod
    def rank(self, waiting: WaitingRequest) -> float:
        """Return the place of a request that has not waited ``ageing_s`` yet; the lowest goes first."""

    def admission_order(self, waiting: Collection[WaitingRequest], now_ns: int) -> Iterable[WaitingRequest]:
        """See :meth:`splitwiser.engine.policy.Policy.admission_order`."""
        return self._sorted(waiting, now_ns)

    def pack(self, prompts: Sequence[PendingPrompt], budget: int, now_ns: int) -> list[tuple[PendingPrompt, int]]:
        """See :meth:`splitwiser.engine.policy.Policy.pack`."""
        return pack_in_order(self._sorted(prompts, now_ns), budget)

    def _sorted(self, waiting: Iterable[W], now_ns: int) -> list[W]:
        aged_ns = now_ns - self.ageing_s * 1e9

        def place(each: WaitingRequest) -> tuple[bool, float, int]:
            is_young = each.arrival_ns > aged_ns
            return is_young, self.rank(each) if is_young else 0, each.arrival_ns

        return sorted(waiting, key=place)


class ShortestPrompt(Ranked):
    """The fewest prompt tokens that are still to be prefilled first, which lowers the mean TTFT."""

    def rank(self, waiting: WaitingRequest) -> float:
        """See :meth:`Ranked.rank`."""
        return waiting.left


class ShortestRemaining(Ranked):
    """The least work first: tokens that are still to be prefilled, and the new tokens that follow: as many as
    :attr:`~splitwiser.request.Request.predicted_tokens` says, else the most that may."""

    def rank(self, waiting: WaitingRequest) -> float:
        """See :meth:`Ranked.rank`."""
        request = waiting.request
        new_tokens = request.max_tokens if request.predicted_tokens is None else request.predicted_tokens
        return waiting.left + max(1, new_tokens - len(waiting.token_ids))


class Priority(Ranked):
    """The lowest :attr:`~splitwiser.request.Request.priority` first, as vLLM has it."""

    def rank(self, waiting: WaitingRequest) -> float:
        """See :meth:`Ranked.rank`."""
        return waiting.request.priority


@dataclass(frozen=True)
class Deadline(Ranked):
    """The earliest deadline first: the arrival and the request's own
    :attr:`~splitwiser.request.Request.ttft_target_ms` or, without one, this ``ttft_target_ms``."""

    ttft_target_ms: Annotated[float, Gt(0), must_be("more than 0 milliseconds")] = constants.TTFT_TARGET_MS

    def rank(self, waiting: WaitingRequest) -> float:
        """See :meth:`Ranked.rank`."""
        own_ms = waiting.request.ttft_target_ms
        return waiting.arrival_ns + (self.ttft_target_ms if own_ms is None else own_ms) * 1e6
