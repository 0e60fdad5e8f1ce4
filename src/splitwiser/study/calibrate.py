"""Measures how a placement changes the times of steps, from a short real run of the placement.

Concurrent phases share caches, memory bandwidth and, on a GPU, the multiprocessors; a profile of each phase alone does not
show how much this slows them down. So a few requests of the workload are run, and the time of every step is compared with
the profile's prediction for a step of its size.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from splitwiser.engine.engine import Observer
from splitwiser.engine.messages import Phase, StepRecord
from splitwiser.placement.cores import plan_threads
from splitwiser.placement.layout import WorkerLayout
from splitwiser.request import RequestOutput
from splitwiser.study.simulate import Conditions
from splitwiser.study.step_times import Chunk, StepCosts, nearest_costs

_ALONE, _BESIDE = 0.1, 0.9  # up to the first overlap a step counts as alone, from the second as concurrent


class Recording(Observer):
    """An observer that keeps the steps and outputs of a run."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.outputs: list[RequestOutput] = []

    def on_step(self, record: StepRecord) -> None:
        """See :class:`Observer`."""
        self.steps.append(record)

    def on_output(self, output: RequestOutput) -> None:
        """See :class:`Observer`."""
        self.outputs.append(output)


@dataclass(frozen=True)
class SizedStep:
    """A step that ran and its size: the chunks of a prefill step, or the batch and total context of a decode step; a hybrid
    step has both."""

    record: StepRecord
    chunks: tuple[Chunk, ...] = ()
    batch: int = 0
    context: int = 0

    @property
    def seconds(self) -> float:
        """Its duration in seconds."""
        return (self.record.end_ns - self.record.start_ns) / 1e9

    def predicted(self, costs: StepCosts) -> float:
        """Return its duration in seconds as predicted by ``costs``."""
        if self.chunks and self.batch:
            return costs.hybrid(self.chunks, self.batch, self.context)
        return costs.prefill(self.chunks) if self.chunks else costs.decode(self.batch, self.context)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that it is of."""
        sizes: dict[Phase, int] = {"prefill": len(self.chunks), "decode": self.batch}
        return tuple(phase for phase, size in sizes.items() if size)


def size_steps(recording: Recording) -> list[SizedStep]:
    """Return the steps with their sizes, of a run whose requests all arrived at its start.

    A prefill worker processes its prompts in order, so its steps divide their concatenation; a decode step generated each
    token whose time is the end of the step.
    """
    decoded: dict[tuple[str, int], list[int]] = defaultdict(list)  # worker and end of the step: contexts
    prompts: dict[str, list[RequestOutput]] = defaultdict(list)
    for output in sorted(recording.outputs, key=lambda each: (each.metrics.prefill_start_ns, each.request_id)):
        metrics = output.metrics
        prompts[metrics.prefill_worker].append(output)
        for number, moment in enumerate(metrics.token_ns[1:], start=1):
            decoded[metrics.decode_worker, moment].append(len(output.prompt_token_ids) + number)
    rows = {worker: [len(output.prompt_token_ids) for output in each] for worker, each in prompts.items()}
    cut = {worker: _Row(lengths) for worker, lengths in rows.items()}
    sized = []
    for record in sorted(recording.steps, key=lambda each: each.start_ns):
        prompt_tokens = record.tokens - record.decode_tokens
        chunks = tuple(cut[record.worker].take(prompt_tokens)) if prompt_tokens else ()
        contexts = decoded.get((record.worker, record.end_ns), []) if record.decode_tokens else []
        if chunks or contexts:
            sized.append(SizedStep(record, chunks, len(contexts), sum(contexts)))
    return sized


class _Row:
    """A queue of prompts of these lengths, from which steps take tokens."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._at = 0
        self._done = 0

    def take(self, tokens: int) -> list[Chunk]:
        chunks = []
        while tokens:
            count = min(tokens, self._lengths[self._at] - self._done)
            chunks.append((self._done, count))
            tokens -= count
            self._done += count
            if self._done == self._lengths[self._at]:
                self._at, self._done = self._at + 1, 0
        return chunks


def conditions_of(
    steps: Sequence[SizedStep],
    costs: Mapping[int, StepCosts],
    layout: WorkerLayout,
    cores: int | None,
    lend: bool,
) -> Conditions:
    """Return the factors that explain ``steps``: measured over predicted seconds, of steps alone and of concurrent steps.

    ``cores`` is None on a GPU. If a phase has no concurrent steps, the factor of its steps alone is used for them too, and
    vice versa.
    """
    threads = dict(zip((spec.name for spec in layout.workers), plan_threads(layout.workers, cores or 1), strict=True))
    seconds: dict[tuple[Phase, bool], list[tuple[float, float]]] = defaultdict(list)
    for step in steps:
        overlap = _overlap(step.record, [other.record for other in steps])
        if _ALONE < overlap < _BESIDE:
            continue
        beside = overlap >= _BESIDE
        own = threads[step.record.worker]
        count = max(own, cores or 1) if lend and not beside else own
        for phase in step.phases:
            seconds[phase, beside].append((step.seconds, step.predicted(nearest_costs(costs, count))))

    def factor(phase: Phase, beside: bool) -> float:
        pairs = seconds[phase, beside] or seconds[phase, not beside]
        predicted = sum(each for _, each in pairs)
        return sum(each for each, _ in pairs) / predicted if predicted else 1.0

    return Conditions(
        factor("prefill", False), factor("decode", False), factor("prefill", True), factor("decode", True), _gap(steps)
    )


def _overlap(record: StepRecord, others: Sequence[StepRecord]) -> float:
    """Return the largest fraction of a step's time during which one other worker was also in a step."""
    by_worker: dict[str, int] = defaultdict(int)
    for other in others:
        if other.worker != record.worker:
            shared = min(record.end_ns, other.end_ns) - max(record.start_ns, other.start_ns)
            by_worker[other.worker] += max(0, shared)
    return max(by_worker.values(), default=0) / max(1, record.end_ns - record.start_ns)


def _gap(steps: Sequence[SizedStep]) -> float:
    """Return the median seconds between two steps of a worker; the median ignores the few long waits for work."""
    gaps = []
    for worker in {step.record.worker for step in steps}:
        records = sorted(
            (step.record for step in steps if step.record.worker == worker), key=lambda each: each.start_ns
        )
        gaps += [later.start_ns - earlier.end_ns for earlier, later in pairwise(records)]
    return max(0.0, median(gaps) / 1e9) if gaps else 0.0
