"""The prefill side of a worker: a queue of prompts, prefilled in steps that the policy packs."""

from dataclasses import dataclass
from itertools import zip_longest

from splitwiser.engine.messages import Handoff, PrefillTask
from splitwiser.engine.policy import FIRST_COME, PendingPrompt, Policy
from splitwiser.engine.sampling import Sampled
from splitwiser.engine.steps import Chunk, SequenceState, Stepper
from splitwiser.errors import RunError

Packed = list[tuple[PendingPrompt, int]]
"""The prompts of a step, each with its number of tokens in it."""


@dataclass(frozen=True)
class PrefillResult:
    """Result of one prefill step: its times, its size, and the task and handoff of each prompt that it finished."""

    start_ns: int
    end_ns: int
    requests: int
    tokens: int
    finished: list[tuple[PrefillTask, Handoff]]


class Prefiller:
    """Prefills queued prompts in steps of at most ``budget`` tokens, packed by ``policy``; a longer prompt of an
    encoder-decoder has a step of its own. Writes only to the blocks that each task names. A prompt that shares blocks with
    one that is still to fill them waits until it has. Steps in several threads may run at a time, between :meth:`take` and
    :meth:`record`, which are called one after the other."""

    def __init__(self, name: str, stepper: Stepper, budget: int, policy: Policy = FIRST_COME) -> None:
        self.name = name
        self.stepper = stepper
        self.budget = budget
        self._policy = policy
        self._prompts: list[PendingPrompt] = []

    def add(self, task: PrefillTask) -> None:
        """Queue a prompt."""
        output = list(task.token_ids)
        self._prompts.append(
            PendingPrompt(
                task.request,
                task.arrival_ns,
                task.cached_tokens,
                output,
                task=task,
                sequence=SequenceState(task.request, task.blocks, output),
                follows=next((each for each in self._prompts if each.request.request_id == task.follows), None),
            )
        )

    def drop(self, request_id: int, decode_worker: str) -> PrefillTask | None:
        """Give up the prompt of a cancelled request of ``decode_worker``. Returns its task, or None if there is no such
        prompt, if a step runs over it, or if another one waits for what it fills."""
        tasks = {(prompt.task.request.request_id, prompt.task.decode_worker): prompt for prompt in self._prompts}
        dropped = tasks.get((request_id, decode_worker))
        if dropped is None or dropped.in_step:
            return None
        if any(prompt.follows is dropped and not prompt.is_ready for prompt in self._prompts):
            return None
        self._prompts.remove(dropped)
        return dropped.task

    @property
    def waiting(self) -> int:
        """Number of prompts that wait for prefill, or for the rest of it, and are in no step now."""
        return sum(not prompt.in_step for prompt in self._prompts)

    @property
    def has_backlog(self) -> bool:
        """Whether more tokens wait than a step takes, beside those of steps that run now."""
        return sum(prompt.left for prompt in self._prompts if not prompt.in_step) > self.budget

    def take(self, budget: int, *, late: bool = False) -> Packed:
        """Return the prompts of a step of at most ``budget`` tokens, and leave them out of others until :meth:`record`:
        those of :meth:`pack` or, with ``late``, some of the later half of the policy's order."""
        packed = self._pack_late(budget) if late else self.pack(budget)
        for prompt, _ in packed:
            prompt.in_step = True
        return packed

    def _pack_late(self, budget: int) -> Packed:
        now_ns = self.stepper.now_ns()
        ready = self._find_ready()
        by_id = {prompt.request.request_id: prompt for prompt in ready}
        order = [by_id[each.request.request_id] for each in self._policy.admission_order(ready, now_ns)]
        return self._policy.pack(order[len(order) // 2 :], budget, now_ns) if order else []

    def _find_ready(self) -> list[PendingPrompt]:
        """Return the prompts that a step may take, in order of arrival."""
        return [prompt for prompt in self._prompts if prompt.is_ready and not prompt.in_step]

    def pack(self, budget: int, *, fill: bool = False) -> Packed:
        """Return the prompts of the next step, of at most ``budget`` tokens, each with its number of tokens in it.

        The policy packs them; with ``fill``, it goes on with the others until the budget is used up, and so may split one
        more. If the one that it puts first waits for another's prefill, that comes before all (priority inheritance: Sha,
        Rajkumar and Lehoczky, 1990). Raises :class:`RunError` if the policy splits what an encoder has to read as a whole.
        """
        now_ns, room = self.stepper.now_ns(), budget
        others = self._find_ready()
        packed: Packed = []
        if len(others) < self.waiting and (awaited := self._find_awaited(now_ns)) and not awaited.in_step:
            packed = [(awaited, min(awaited.left, room))]
            others.remove(awaited)
            room -= packed[0][1]
        while others and room > 0:
            more = self._policy.pack(others, room, now_ns)
            if any(tokens < prompt.fewest for prompt, tokens in more):
                raise RunError(f"{self.name}: the policy splits a prompt that an encoder has to read as a whole")
            used = sum(tokens for _, tokens in more)
            if packed and used > room:  # an encoder's, which waits for a step of its own
                break
            packed += more
            if not fill:
                break
            chosen, room = {id(prompt) for prompt, _ in more}, room - used
            others = [prompt for prompt in others if id(prompt) not in chosen]
        return packed

    def _find_awaited(self, now_ns: int) -> PendingPrompt | None:
        """Return the prompt that the policy's first one waits for, None if that waits for none."""
        first = next(iter(self._policy.admission_order(self._prompts, now_ns)))
        awaited = None
        while isinstance(first, PendingPrompt) and first.follows and not first.is_ready:
            awaited = first = first.follows
        return awaited

    def record(self, packed: Packed, sampled: Sampled, start_ns: int, end_ns: int) -> PrefillResult:
        """Take what a step of ``packed`` from ``start_ns`` to ``end_ns`` has ``sampled`` for the prompts that end in it, and
        return its result."""
        for prompt, tokens in packed:
            prompt.start_ns = prompt.start_ns or start_ns
            prompt.done += tokens
            prompt.in_step = False
        ended = [prompt for prompt, _ in packed if not prompt.left]
        firsts = zip_longest(ended, sampled.tokens, sampled.logprobs)  # log-probabilities only if one asks for them
        finished = [
            (
                prompt.task,
                Handoff(
                    prompt.request.request_id, token, prompt.start_ns, end_ns, self.name, prompt.task.cached_tokens,
                    logprobs, tuple(prompt.sequence.prompt_logprobs),
                ),
            )
            for prompt, token, logprobs in firsts
        ]  # fmt: skip
        self._prompts = [prompt for prompt in self._prompts if prompt.left]
        return PrefillResult(start_ns, end_ns, len(packed), sum(tokens for _, tokens in packed), finished)


def chunks_of(packed: Packed) -> list[Chunk]:
    """Return the chunks of a step of ``packed``."""
    return [Chunk(prompt.sequence, prompt.done, tokens) for prompt, tokens in packed]
