"""What a ``mixed`` worker runs next: a prefill step, a decode step, one after the other, or both in one forward.

A schedule decides between the phases; which prompts a step takes is the policy's matter (:mod:`splitwiser.engine.policy`).
Another schedule is a class with the method of :class:`Schedule` in a module of its own, and a row in :data:`SCHEDULES`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from splitwiser.engine.registry import Registry

SCHEDULES = {
    "alternate": "splitwiser.engine.schedule:Alternate",
    "prefill_first": "splitwiser.engine.schedule:PrefillFirst",
    "decode_first": "splitwiser.engine.schedule:DecodeFirst",
    "hybrid": "splitwiser.engine.schedule:Hybrid",
}
"""Where the class of each schedule is, by the name that ``--schedule`` takes."""

KEEP_ITL_TARGET = ("hybrid",)
"""The schedules of the table that keep ``--itl_target_ms`` where it is given."""

MEASURE_BUDGET = ("hybrid",)
"""The schedules of the table whose budget is that of :func:`saturating_tokens` where neither ``--prefill_tokens`` nor
``--itl_target_ms`` is given."""

FIXED_PART = 0.05  # of a step's time, which more tokens would share
FEWEST_TOKENS = 256  # of a measured budget, so that a disturbed measurement does not make steps tiny
MEASURED_TOKENS = (16, 64, 256, 1024)  # of the steps that are measured
MEASURED_S = 0.1  # seconds of them all, after which no larger step is measured


class StepTime(NamedTuple):
    """The size of a step that has run, and how long it took: its prompt tokens, its decode tokens (one of each request in
    decode) and its seconds."""

    prompt_tokens: int
    decode_tokens: int
    seconds: float


class Work(NamedTuple):
    """What a worker has to do: ``waiting`` prompts, and ``running`` requests in decode. ``prefill_tokens`` is
    ``--prefill_tokens`` or the measured budget, and ``itl_target_s`` is ``--itl_target_ms`` in seconds, None if it is not
    given; ``last`` is the worker's last step, None before the first."""

    waiting: int
    running: int
    prefill_tokens: int
    itl_target_s: float | None = None
    last: StepTime | None = None


class Plan(NamedTuple):
    """What a worker runs next: a prefill step of at most ``prefill_tokens`` prompt tokens (0: none), and then, if
    ``decodes``, a decode step of all running requests; with ``together``, both in one forward."""

    prefill_tokens: int
    decodes: bool
    together: bool = False


class Schedule(Protocol):
    """Interface of schedules. Called before every step, so it must be fast. Each worker asks an object of its own, which may
    keep state."""

    def plan(self, work: Work) -> Plan:
        """Return what to run next. If there is work, at least one step of it must be planned; a step of a phase that has
        nothing to do is left out."""
        ...


class Alternate:
    """One prefill step and one decode step in turn, as long as both phases have work."""

    def plan(self, work: Work) -> Plan:
        """See :meth:`Schedule.plan`."""
        return Plan(work.prefill_tokens, decodes=True)


class PrefillFirst:
    """Prefill as long as a prompt waits, and only then decode: the least TTFT, and every running request waits for it."""

    def plan(self, work: Work) -> Plan:
        """See :meth:`Schedule.plan`."""
        return Plan(work.prefill_tokens, decodes=not work.waiting)


class DecodeFirst:
    """Decode as long as a request runs, and only then one prefill step: the least ITL, and small batches."""

    def plan(self, work: Work) -> Plan:
        """See :meth:`Schedule.plan`."""
        return Plan(0 if work.running else work.prefill_tokens, decodes=True)


class Hybrid:
    """Chunked prefill in hybrid batches: each step has the decode tokens of all running requests, and fills a budget of
    tokens up with a chunk of the prompts, as Sarathi-Serve does it (Agrawal et al., arXiv 2403.02310, algorithm 3).

    The budget is ``--prefill_tokens``, by default :func:`saturating_tokens`, of which decode tokens take their part; at
    least one prompt token goes along, so that no prompt starves. With ``--itl_target_ms``, the chunk also is the largest
    that keeps the target: where a step with ``n`` prompt tokens has taken ``t`` seconds, the next has ``n target / t``. As
    ``t = a + b n``, that approaches the size at which ``t`` is the target, without going past it while ``a`` and ``b`` stay.
    """

    def __init__(self) -> None:
        self._chunk: float | None = None  # prompt tokens that keep the target; None until a step shows it

    def plan(self, work: Work) -> Plan:
        """See :meth:`Schedule.plan`."""
        if work.itl_target_s is not None and work.last is not None:
            self._measure(work.last, work.itl_target_s)
        if not (work.waiting and work.running):
            return Plan(work.prefill_tokens, decodes=not work.waiting)
        room = max(1, work.prefill_tokens - work.running)
        return Plan(room if self._chunk is None else min(room, int(self._chunk)), decodes=True, together=True)

    def _measure(self, last: StepTime, target_s: float) -> None:
        """Learn from the last step. One that is slowed down or sped up once counts for a factor of 2 at most."""
        if not last.prompt_tokens:
            return
        fitting = max(1.0, last.prompt_tokens * target_s / last.seconds)
        if self._chunk is None:
            self._chunk = fitting
        elif last.decode_tokens and (last.prompt_tokens >= int(self._chunk) or last.seconds > target_s):
            self._chunk = min(max(fitting, self._chunk / 2), self._chunk * 2)


ALTERNATE = Alternate()

_REGISTRY: Registry[Schedule] = Registry("schedule", SCHEDULES, "splitwiser.engine.schedule.Schedule", ("plan",))
find_schedule = _REGISTRY.find
describe_schedule = _REGISTRY.describe


def saturating_tokens(step_s: Callable[[int], float], most: int) -> int:
    """Return the fewest tokens of a step, of 256 to ``most`` ones, with which throughput is within 5% of its limit: so many
    that they saturate the device (Sarathi-Serve, section 4.3). More would save little, and make all wait for longer steps.

    A step of ``n`` tokens takes ``a + b n`` seconds, so ``n / (a + b n)`` tokens a second, which approaches ``1 / b``; ``a``
    is 5% of a step of ``n = 19 a / b`` tokens. Both are fitted, with the least squared relative errors, to ``step_s(n)``,
    the seconds of prefill steps of :data:`MEASURED_TOKENS`: two of them, and more as long as all take little time.
    """
    tokens: list[int] = []
    seconds: list[float] = []
    for size in MEASURED_TOKENS:
        if len(tokens) < 2 or sum(seconds) < MEASURED_S:
            tokens.append(size)
            seconds.append(step_s(size))
    weights = 1 / np.array(seconds)
    features = np.stack([weights, weights * np.array(tokens)], axis=1)
    (fixed, per_token), *_ = np.linalg.lstsq(features, np.ones(len(tokens)))
    needed = (1 / FIXED_PART - 1) * fixed / per_token if per_token > 0 else most
    return max(min(FEWEST_TOKENS, most), min(round(needed), most))


def measures_budget(schedule: str) -> bool:
    """Return whether the budget of ``schedule``, a value of ``--schedule``, is measured where none is given."""
    return _REGISTRY.name(schedule) in MEASURE_BUDGET


def keeps_itl_target(schedule: str) -> bool:
    """Return whether ``schedule``, a value of ``--schedule``, keeps ``--itl_target_ms``. A class of the user's own is taken
    to."""
    name = _REGISTRY.name(schedule)
    return name not in SCHEDULES or name in KEEP_ITL_TARGET
