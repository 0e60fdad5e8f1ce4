"""Scheduling decisions: the order of admission, the packing of a prefill step, and the decode worker of each request.

Queues, blocks and steps belong to the workers (:mod:`splitwiser.engine.prefill`, :mod:`splitwiser.engine.decode`), which
impose no order of their own. Another policy is a class with the methods of :class:`Policy` in a module of its own, and a row
in :data:`POLICIES`; one that ranks requests is a subclass of :class:`splitwiser.engine.ranked.Ranked`.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from splitwiser.engine.messages import PrefillTask
from splitwiser.errors import InputError, first_line, unknown_name
from splitwiser.formats import parse_as
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

READ_BY = {"priority": ("priority",), "ttft_target_ms": ("deadline",)}
"""Which policies of the table read these fields of a :class:`~splitwiser.request.Request`."""


@dataclass(eq=False)
class WaitingRequest:
    """A request that waits for blocks or for prefill. It arrived at ``arrival_ns``, in nanoseconds of the clock of all
    workers; ``done`` of its prompt tokens have been prefilled."""

    request: Request
    arrival_ns: int
    done: int = 0

    @property
    def left(self) -> int:
        """Number of prompt tokens that are still to be prefilled."""
        return len(self.request.prompt_token_ids) - self.done


@dataclass(eq=False, kw_only=True)
class PendingPrompt(WaitingRequest):
    """A request that has its blocks and waits for prefill; its first prefill step began at ``start_ns`` (0: none has)."""

    task: PrefillTask
    sequence: "SequenceState"
    start_ns: int = 0

    @property
    def fewest(self) -> int:
        """Fewest tokens that a step may prefill: an encoder reads the whole prompt at once, a decoder any part of it."""
        return self.left if self.request.encoded else 1


class Policy(Protocol):
    """Interface of scheduling policies. Called before every step, so it must be fast; ``now_ns`` is the time then."""

    def admission_order(self, waiting: Collection[WaitingRequest], now_ns: int) -> Iterable[WaitingRequest]:
        """Return ``waiting``, which is in order of arrival, in the order in which requests are to get blocks.

        Admission stops at the first request that does not fit, so that later ones cannot starve it."""
        ...

    def pack(self, prompts: Sequence[PendingPrompt], budget: int, now_ns: int) -> list[tuple[PendingPrompt, int]]:
        """Return the prompts of the next prefill step, each with its number of tokens in that step (``fewest`` to ``left``).

        ``prompts`` are all that wait, in order of admission; if there are any, at least one must be chosen. All tokens
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


def policy_name(given: str) -> str:
    """Return ``given``, a value of ``--policy``, with the policy's name as :data:`POLICIES` spells it."""
    name, colon, parameters = _split(given)
    return f"{SPELLINGS.get(name, name)}{colon}{parameters}"


def reads(policy: str, field: str) -> bool:
    """Return whether ``policy``, a value of ``--policy``, orders requests by their ``field`` of :data:`READ_BY`. A class of
    the user's own is taken to."""
    name, _, _ = _split(policy_name(policy))
    return name not in POLICIES or name in READ_BY[field]


def find_policy(given: str) -> Policy:
    """Return the policy ``NAME`` or ``NAME:PARAMETER=VALUE,...``. The name is a key of :data:`POLICIES`, or ``MODULE:CLASS``
    for a class that Python can import; the parameters are fields of its class, which is then a dataclass.

    Raises :class:`~splitwiser.errors.InputError` if there is none, if a parameter is unknown or invalid, or if the policy
    lacks a method of :class:`Policy`.
    """
    name, _, parameters = _split(policy_name(given))
    module, colon, class_name = POLICIES.get(name, name).partition(":")
    if not colon:
        raise unknown_name("policy", name, [*POLICIES, "MODULE:CLASS"])
    if module in POLICIES:
        raise InputError(f"--policy {given}: parameters are given as {module}:PARAMETER=VALUE,...")
    try:
        kind = getattr(import_module(module), class_name)
        policy: Policy = _make(kind, parameters, f"--policy {given}") if parameters else kind()
    except InputError:
        raise
    except Exception as error:  # a user's module may raise anything
        raise InputError(f"--policy {given}: {type(error).__name__}: {first_line(error)}") from error
    for method in ("admission_order", "pack"):
        if not callable(getattr(policy, method, None)):
            raise InputError(
                f"--policy {given}: has no method {method}; splitwiser.engine.policy.Policy says what it does"
            )
    return policy


def describe_policy(given: str) -> dict[str, object]:
    """Return the class of :func:`find_policy`'s policy and all of its parameters, for the run's record."""
    policy = find_policy(given)
    kind = type(policy)
    return {"class": f"{kind.__module__}:{kind.__qualname__}"} | {
        name: getattr(policy, name) for name in _parameter_names(kind)
    }


def _split(given: str) -> tuple[str, str, str]:
    """Return the name, the colon and the parameters of ``NAME:PARAMETER=VALUE,...``, whose name may be ``MODULE:CLASS``."""
    name, *parameters = re.split(r":\s*(?=\w*=)", given, maxsplit=1)
    return name, ":" if parameters else "", "".join(parameters)


def _make(kind: type, parameters: str, where: str) -> Any:  # noqa: ANN401  # a ``kind``
    """Return an instance of ``kind`` with the ``parameters`` of its name. Raises :class:`InputError`, beginning with
    ``where``."""
    values: dict[str, str] = {}
    for each in parameters.split(","):
        name, equals, value = each.strip().partition("=")
        if not equals or name in values:
            raise InputError(f"{where}: '{each}' must be PARAMETER=VALUE, each parameter once")
        values[name] = value
    known = _parameter_names(kind)
    unknown = [name for name in values if name not in known]
    if unknown and not known:
        raise InputError(f"{where}: {kind.__name__} has no parameters")
    if unknown:
        raise InputError(f"{where}: {unknown_name('parameter', unknown[0], known)}")
    return parse_as(kind, values, where)


def _parameter_names(kind: type) -> list[str]:
    return [each.name for each in fields(kind)] if is_dataclass(kind) else []


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

    def owner(self, request_id: int) -> str:
        """Return the name of the worker that was chosen for a request which has not finished."""
        return self._reserved[request_id][0]

    def release(self, request_id: int) -> None:
        """Count the blocks of a finished request as free again."""
        name, blocks = self._reserved.pop(request_id)
        self._free[name] += blocks
