"""The prefill side of a worker: a queue of prompts, prefilled in steps that the policy packs."""

from dataclasses import dataclass
from itertools import zip_longest

from splitwiser.engine.messages import Handoff, PrefillTask
from splitwiser.engine.policy import FIRST_COME, PendingPrompt, Policy
from splitwiser.engine.steps import Chunk, SequenceState, Stepper
from splitwiser.errors import RunError


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
    encoder-decoder has a step of its own. Writes only to the blocks that each task names."""

    def __init__(self, name: str, stepper: Stepper, budget: int, policy: Policy = FIRST_COME) -> None:
        self.name = name
        self._stepper = stepper
        self._budget = budget
        self._policy = policy
        self._prompts: list[PendingPrompt] = []

    def add(self, task: PrefillTask) -> None:
        """Queue a prompt."""
        sequence = SequenceState(task.request, task.blocks)
        self._prompts.append(PendingPrompt(task.request, task.arrival_ns, task=task, sequence=sequence))

    def drop(self, request_id: int) -> PrefillTask | None:
        """Give up the prompt of a cancelled request. Returns its task, or None if there is no such prompt."""
        dropped = next((prompt for prompt in self._prompts if prompt.request.request_id == request_id), None)
        if dropped is None:
            return None
        self._prompts.remove(dropped)
        return dropped.task

    def step(self) -> PrefillResult | None:
        """Run one prefill step and return its result, or None if no prompt waits."""
        if not self._prompts:
            return None
        packed = self._policy.pack(self._prompts, self._budget, self._stepper.now_ns())
        if any(tokens < prompt.fewest for prompt, tokens in packed):
            raise RunError(f"{self.name}: the policy splits a prompt that an encoder has to read as a whole")
        chunks = [Chunk(prompt.sequence, prompt.done, tokens) for prompt, tokens in packed]
        start_ns = self._stepper.now_ns()
        sampled = self._stepper.prefill(chunks)
        end_ns = self._stepper.now_ns()
        for prompt, tokens in packed:
            prompt.start_ns = prompt.start_ns or start_ns
            prompt.done += tokens
        ended = [prompt for prompt, _ in packed if not prompt.left]
        firsts = zip_longest(ended, sampled.tokens, sampled.logprobs)  # log-probabilities only if one asks for them
        finished = [
            (
                prompt.task,
                Handoff(
                    prompt.request.request_id, token, prompt.start_ns, end_ns, self.name, logprobs,
                    tuple(prompt.sequence.prompt_logprobs),
                ),
            )
            for prompt, token, logprobs in firsts
        ]  # fmt: skip
        self._prompts = [prompt for prompt in self._prompts if prompt.left]
        return PrefillResult(start_ns, end_ns, len(packed), sum(tokens for _, tokens in packed), finished)
