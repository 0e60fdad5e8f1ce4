"""Scheduling decisions: the order of admission, the packing of a prefill step, and the decode worker of each request.

Queues, blocks and steps belong to the workers (:mod:`splitwiser.engine.prefill`, :mod:`splitwiser.engine.decode`), which
impose no order of their own. Another policy is a class with the methods of :class:`Policy` in a module of its own, and a row
in :data:`POLICIES`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from splitwiser.engine.messages import PrefillTask
from splitwiser.errors import InputError, first_line, unknown_name
from splitwiser.request import Request

if TYPE_CHECKING:  # a configuration is checked without importing torch
    from splitwiser.engine.steps import SequenceState

POLICIES = {
    "first_come": "splitwiser.engine.policy:FirstCome",
}
"""Where the class of each policy is, by the name that ``--policy`` takes."""


@dataclass(eq=False)
class PendingPrompt:
    """A prompt that waits for prefill; ``done`` of its tokens have been prefilled since ``start_ns``."""

    task: PrefillTask
    sequence: "SequenceState"
    done: int = 0
    start_ns: int = 0

    @property
    def left(self) -> int:
        """Number of prompt tokens that are still to be prefilled."""
        return len(self.task.request.prompt_token_ids) - self.done

    @property
    def fewest(self) -> int:
        """Fewest tokens that a step may prefill: an encoder reads the whole prompt at once, a decoder any part of it."""
        return self.left if self.task.request.encoded else 1


class Policy(Protocol):
    """Interface of scheduling policies. Called before every step, so it must be fast."""

    def admission_order(self, waiting: Collection[Request]) -> Iterable[Request]:
        """Return ``waiting``, which is in order of arrival, in the order in which requests are to get blocks.

        Admission stops at the first request that does not fit, so that later ones cannot starve it."""
        ...

    def pack(self, prompts: Sequence[PendingPrompt], budget: int) -> list[tuple[PendingPrompt, int]]:
        """Return the prompts of the next prefill step, each with its number of tokens in that step (``fewest`` to ``left``).

        ``prompts`` are all that wait, in order of arrival; if there are any, at least one must be chosen. All tokens
        together are at most ``budget``, but a prompt of which no part fits may have a step of its own."""
        ...


class FirstCome:
    """First come, first served: as many whole prompts per step as fit the budget, in order of arrival; a prompt longer than
    the budget is split over several steps or, where it must be whole, gets a step of its own."""

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
            packed.append((prompt, max(prompt.fewest, min(prompt.left, room))))
            room -= packed[-1][1]
        return packed


FIRST_COME = FirstCome()


def find_policy(name: str) -> Policy:
    """Return a policy of the class ``name``: a key of :data:`POLICIES`, or ``MODULE:CLASS`` for one that Python can import.

    Raises :class:`~splitwiser.errors.InputError` if there is none, or if it lacks a method of :class:`Policy`.
    """
    module, colon, class_name = POLICIES.get(name, name).partition(":")
    if not colon:
        raise unknown_name("policy", name, [*POLICIES, "MODULE:CLASS"])
    try:
        policy: Policy = getattr(import_module(module), class_name)()
    except Exception as error:  # a user's module may raise anything
        raise InputError(f"--policy {name}: {type(error).__name__}: {first_line(error)}") from error
    for method in ("admission_order", "pack"):
        if not callable(getattr(policy, method, None)):
            raise InputError(
                f"--policy {name}: has no method {method}; splitwiser.engine.policy.Policy says what it does"
            )
    return policy


class LeastLoadedRouter:
    """Assigns each request to the decode worker with the most unreserved blocks.

    ``blocks`` gives the number of blocks that each decode worker owns, by name.
    """

    def __init__(self, blocks: Mapping[str, int], block_tokens: int) -> None:
        self._free = dict(blocks)
        self._block_tokens = block_tokens
        self._reserved: dict[int, tuple[str, int]] = {}

    def choose(self, request: Request) -> str:
        """Return the name of the worker for ``request``, and count the request's blocks as reserved there."""
        name = max(self._free, key=self._free.__getitem__)
        blocks = -(-request.max_kv_tokens // self._block_tokens)
        self._free[name] -= blocks
        self._reserved[request.request_id] = name, blocks
        return name

    def release(self, request_id: int) -> None:
        """Count the blocks of a finished request as free again."""
        name, blocks = self._reserved.pop(request_id)
        self._free[name] += blocks
