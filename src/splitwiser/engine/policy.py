"""Scheduling decisions: the order of admission, the packing of a prefill step, and the decode worker of each request.

Queues, blocks and steps belong to the workers (:mod:`splitwiser.engine.prefill`, :mod:`splitwiser.engine.decode`), which
impose no order of their own. Another policy is a class with the methods of :class:`Policy` in a module of its own, and a row
in :data:`POLICIES`; one that ranks requests is a subclass of :class:`splitwiser.engine.ranked.Ranked`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Protocol

from splitwiser.engine.messages import PrefillTask
from splitwiser.engine.registry import Registry
from splitwiser.request import Request

if TYPE_CHECKING:  # a configuration is checked without importing torch
    from splitwiser.engine.steps import SequenceState

POLICIES = {
    "first_come": "splitwiser.engine.policy:FirstCome",
    "shortest_prompt": "splitwiser.engine.ranked:ShortestPrompt",
    "shortest_remaining": "splitwiser.engine.ranked:ShortestRemaining",
    "priority": "splitwiser.engine.ranked:Priority",
    "deadline": "splitwiser.engine.ranked:Deadline",
}
"""Where the class of each policy is, by the name that ``--policy`` takes."""

SPELLINGS = {"fcfs": "first_come"}
"""Names that other engines have for policies."""

READ_BY = {
    "priority": ("priority",), "ttft_target_ms": ("deadline",), "predicted_tokens": ("shortest_remaining",)
}  # fmt: skip
"""Which policies of the table read these fields of a :class:`~splitwiser.request.Request`."""


@dataclass(eq=False)
class WaitingRequest:
    """A request that waits for blocks or for prefill. It arrived at ``arrival_ns``, in nanoseconds of the clock of all
    workers; ``done`` of its tokens have been prefilled. One that was preempted has the output ``token_ids`` already, which
    are prefilled with its prompt."""

    request: Request
    arrival_ns: int
    done: int = 0
    token_ids: Sequence[int] = ()

    @property
    def left(self) -> int:
        """Number of tokens that are still to be prefilled."""
        return len(self.request.prompt_token_ids) + len(self.token_ids) - self.done


@dataclass(eq=False, kw_only=True)
class PendingPrompt(WaitingRequest):
    """A request that has its blocks and waits for prefill; its first prefill step began at ``start_ns`` (0: none has). It
    begins with tokens that ``follows`` is to prefill first, if that is not None. ``in_step`` says whether a step that runs
    now has it."""

    task: PrefillTask
    sequence: "SequenceState"
    start_ns: int = 0
    follows: "PendingPrompt | None" = None
    in_step: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether the tokens are prefilled that another prompt is to prefill first."""
        return self.follows is None or self.follows.done >= self.task.cached_tokens

    @property
    def fewest(self) -> int:
        """Fewest tokens that a step may prefill: an encoder reads the whole prompt at once, a decoder any part of it."""
        return self.left if self.request.encoded else 1


class Policy(Protocol):
    """Interface of scheduling policies. Called before every step, so it must be fast; ``now_ns`` is the time then."""

    def admission_order(self, waiting: Collection[WaitingRequest], now_ns: int) -> Iterable[WaitingRequest]:
        """Return ``waiting``, which is in order of arrival, in the order in which requests are to get blocks.

        Admission stops at the first request that does not fit, so that later ones cannot starve it. Where requests that run
        need more blocks than are free, they are asked for in the same way, and the last one is preempted. So are prompts of
        which some wait for another's prefill: what the first one waits for is prefilled first."""
        ...

    def pack(self, prompts: Sequence[PendingPrompt], budget: int, now_ns: int) -> list[tuple[PendingPrompt, int]]:
        """Return the prompts of the next prefill step, each with its number of tokens in that step (``fewest`` to ``left``).

        ``prompts`` are all that can go on, in order of admission; if there are any, at least one must be chosen. All tokens
        together are at most ``budget``, but a prompt of which no part fits may have a step of its own."""
        ...


class FirstCome:
    """First come, first served: in order of arrival."""

    def admission_order(self, waiting: Collection[WaitingRequest], now_ns: int) -> Iterable[WaitingRequest]:
        """See :meth:`Policy.admission_order`."""
        return waiting

    def pack(self, prompts: Sequence[PendingPrompt], budget: int, now_ns: int) -> list[tuple[PendingPrompt, int]]:
        """See :meth:`Policy.pack`."""
        return pack_in_order(prompts, budget)


FIRST_COME = FirstCome()


def pack_in_order(prompts: Iterable[PendingPrompt], budget: int) -> list[tuple[PendingPrompt, int]]:
    """Return as many whole prompts, from the first on, as fit ``budget`` tokens, each with its number of tokens. A first
    prompt that is longer than the budget is split over several steps, and others fill the last of these; one that must be
    whole gets a step of its own."""
    packed: list[tuple[PendingPrompt, int]] = []
    room = budget
    for prompt in prompts:
        if packed and prompt.left > room:
            break
        packed.append((prompt, max(prompt.fewest, min(prompt.left, room))))
        room -= packed[-1][1]
    return packed


_REGISTRY: Registry[Policy] = Registry(
    "policy", POLICIES, "splitwiser.engine.policy.Policy", ("admission_order", "pack"), SPELLINGS
)
policy_name = _REGISTRY.spelt
find_policy = _REGISTRY.find
describe_policy = _REGISTRY.describe


def reads(policy: str, field: str) -> bool:
    """Return whether ``policy``, a value of ``--policy``, orders requests by their ``field`` of :data:`READ_BY`. A class of
    the user's own is taken to."""
    name = _REGISTRY.name(policy)
    return name not in POLICIES or name in READ_BY[field]


class Router:
    """Assigns each request to the decode worker that has the most room for it: free are the blocks that its requests cannot
    come to need, and those of the prompt's beginning that it was sent before.

    So a request goes where its beginning is, unless another worker has more free blocks by more than that saves, as in the
    cost function of NVIDIA Dynamo's KV-aware router. If all requests begin alike, each worker computes their beginning once.

    ``blocks`` gives the number of blocks that each decode worker owns, by name; ``shares`` says of a request whether it may
    share blocks. As many blocks of ``block_tokens`` tokens as a worker owns are remembered, those sent last, without asking
    the worker which it still has.
    """

    def __init__(
        self, blocks: Mapping[str, int], block_tokens: int, shares: Callable[[Request], bool] = lambda _: False
    ) -> None:
        self._blocks = blocks
        self._free = dict(blocks)
        self._block_tokens = block_tokens
        self._shares = shares
        self._sent: dict[str, dict[int, None]] = {name: {} for name in blocks}  # the hashes of beginnings, oldest first
        self._reserved: dict[int, tuple[str, int]] = {}

    def choose(self, request: Request) -> str:
        """Return the name of the worker for ``request``, and count the most blocks that it can need there, beside those that
        it finds, as in use."""
        beginnings = self._beginnings(request) if len(self._free) > 1 and self._shares(request) else []
        found = {name: sum(1 for _ in takewhile(sent.__contains__, beginnings)) for name, sent in self._sent.items()}
        name = max(self._free, key=lambda name: self._free[name] + found[name])
        sent = self._sent[name]
        for beginning in reversed(beginnings):  # the shortest is forgotten last
            sent.pop(beginning, None)
            sent[beginning] = None
        while len(sent) > self._blocks[name]:
            del sent[next(iter(sent))]
        blocks = -(-request.max_kv_tokens // self._block_tokens) - found[name]
        self._free[name] -= blocks
        self._reserved[request.request_id] = name, blocks
        return name

    def owner(self, request_id: int) -> str:
        """Return the name of the worker that was chosen for a request which has not finished."""
        return self._reserved[request_id][0]

    def release(self, request_id: int) -> None:
        """Count the blocks of a finished request as free again."""
        name, blocks = self._reserved.pop(request_id)
        self._free[name] += blocks

    def _beginnings(self, request: Request) -> list[int]:
        """Return a hash of the adapter and the prompt up to each multiple of ``block_tokens``. Two of one hash cost a
        better choice at most: whoever shares blocks compares the tokens."""
        tokens, size = request.prompt_token_ids, self._block_tokens
        ends = range(size, len(tokens) + 1, size)
        chain = accumulate(
            (tokens[end - size : end] for end in ends), lambda *pair: hash(pair), initial=hash(request.adapter)
        )
        return list(chain)[1:]
