"""The prefill side of a worker: packs waiting prompts into steps under a token budget."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from splitwiser.kv_pool import KVPool
from splitwiser.messages import Handoff, PrefillTask
from splitwiser.model import LoadedModel
from splitwiser.steps import Chunk, InFlight, prefill_step


@dataclass
class _Prompt:
    task: PrefillTask
    sequence: InFlight
    done: int = 0
    start_ns: int = 0

    @property
    def left(self) -> int:
        return len(self.task.request.prompt_token_ids) - self.done


@dataclass(frozen=True)
class PrefillResult:
    """One step: its times, its size, and the requests whose prompt it finished, each with its task."""

    start_ns: int
    end_ns: int
    requests: int
    tokens: int
    finished: list[tuple[PrefillTask, Handoff]]


class Prefiller:
    """Takes prompts in the order in which they come, as many whole ones a step as ``budget`` tokens allow; a prompt longer
    than the budget is split over steps. Writes only into the blocks that each task names."""

    def __init__(self, name: str, model: LoadedModel, pool: KVPool, budget: int) -> None:
        self.name = name
        self._model = model
        self._pool = pool
        self._budget = budget
        self._queue: deque[_Prompt] = deque()

    def add(self, task: PrefillTask) -> None:
        """Queue a prompt."""
        self._queue.append(_Prompt(task, InFlight(task.request, task.blocks)))

    def step(self) -> PrefillResult | None:
        """Run one step, or None if no prompt waits."""
        packed = self._pack()
        if not packed:
            return None
        chunks = [Chunk(prompt.sequence, prompt.done, tokens) for prompt, tokens in packed]
        start_ns = self.now_ns()
        firsts = iter(self.run_step(chunks))
        end_ns = self.now_ns()
        finished = []
        for prompt, tokens in packed:
            prompt.start_ns = prompt.start_ns or start_ns
            prompt.done += tokens
            if not prompt.left:
                request_id = prompt.task.request.request_id
                handoff = Handoff(request_id, next(firsts), prompt.start_ns, end_ns, self.name)
                finished.append((prompt.task, handoff))
                self._queue.popleft()  # prompts finish in order: only the last of a pack can be unfinished
        return PrefillResult(start_ns, end_ns, len(packed), sum(tokens for _, tokens in packed), finished)

    def run_step(self, chunks: Sequence[Chunk]) -> list[int]:
        """The step itself: the first token of each prompt that ends in it. A simulation has its own."""
        return prefill_step(self._model, self._pool, chunks)

    def now_ns(self) -> int:
        """The clock that steps are timed by."""
        return time.perf_counter_ns()

    def _pack(self) -> list[tuple[_Prompt, int]]:
        packed: list[tuple[_Prompt, int]] = []
        room = self._budget
        for prompt in self._queue:
            if packed and prompt.left > room:
                break
            packed.append((prompt, min(prompt.left, room)))
            room -= packed[-1][1]
        return packed
