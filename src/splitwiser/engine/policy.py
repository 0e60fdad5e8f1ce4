"""What scheduling decides: the order of admission, what a prefill step is packed with, and which worker takes a request.

Queues, blocks and steps are the workers' (:mod:`splitwiser.engine.prefill`, :mod:`splitwiser.engine.decode`); they keep to
no order of their own. Another policy is another class with the methods of :class:`Policy`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from splitwiser.engine.messages import PrefillTask
from splitwiser.engine.steps import InFlight
from splitwiser.request import Request


@dataclass(eq=False)
class PendingPrompt:
    """A prompt that waits for prefill, or of which ``done`` tokens have been prefilled since ``start_ns``."""

    task: PrefillTask
    sequence: InFlight
    done: int = 0
    start_ns: int = 0

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be prefilled."""
        return len(self.task.request.prompt_token_ids) - self.done


class Policy(Protocol):
    """Decides what goes next. Called before every step, so it must be quick."""

    def admission_order(self, waiting: Collection[Request]) -> Iterable[Request]:
        """``waiting`` requests, given in order of arrival, in the order in which they are to get blocks. Admission ends at
        the first that finds no room, so that no later one keeps it waiting for ever."""
        ...

    def pack(self, prompts: Sequence[PendingPrompt], budget: int) -> list[tuple[PendingPrompt, int]]:
        """The prompts of the next prefill step, each with the number of its tokens that are taken (1 to ``left``); together
        at most ``budget``. ``prompts`` are all that wait, in order of arrival; of some, at least one must be taken."""
        ...


class FirstCome:
    """First come, first served: as many whole prompts a step as the budget allows, in order; a prompt longer than the budget
    is split over steps."""

    def admission_order(self, waiting: Collection[Request]) -> Iterable[Request]:
        """See :meth:`Policy.admission_order`."""
        return waiting

    def pack(self, prompts: Sequence[PendingPrompt], budget: int) -> list[tuple[PendingPrompt, int]]:
        """See :meth:`Policy.pack`."""
        packed: list[tuple[PendingPrompt, int]] = []
        room = budget
        for prompt in prompts:
            if packed and prompt.left > room:
                break
            packed.append((prompt, min(prompt.left, room)))
            room -= packed[-1][1]
        return packed


FIRST_COME = FirstCome()


class MostRoom:
    """Chooses the decode worker with the most unreserved blocks for each request.

    ``blocks`` are those that each decode worker owns, by its name.
    """

    def __init__(self, blocks: Mapping[str, int], block_tokens: int) -> None:
        self._room = dict(blocks)
        self._block_tokens = block_tokens
        self._reserved: dict[int, tuple[str, int]] = {}

    def choose(self, request: Request) -> str:
        """The name of the worker that is to take ``request``, whose blocks count as reserved from now on."""
        name = max(self._room, key=self._room.__getitem__)
        blocks = -(-request.most_tokens // self._block_tokens)
        self._room[name] -= blocks
        self._reserved[request.request_id] = name, blocks
        return name

    def release(self, request_id: int) -> None:
        """Count the blocks of a finished request as free again."""
        name, blocks = self._reserved.pop(request_id)
        self._room[name] += blocks
