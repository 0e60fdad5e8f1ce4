"""What a placement does to steps: the same steps as in a profile, timed again in a short real run of the placement.

Side by side, two phases share caches, memory bandwidth and, on a GPU, the multiprocessors; by how much that slows each is
not known from the phases alone. So a few requests of the workload are run, and every step's time is held against what the
profile predicts for a step of its size.
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

_ALONE, _BESIDE = 0.1, 0.9  # a step counts as alone, or as beside another, up to and from such an overlap


class Recording(Observer):
    """Keeps the steps and outputs of a run."""

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
    """A step that ran, and what was in it: chunks of a prefill step, (requests, total context) of a decode step."""

    record: StepRecord
    chunks: tuple[Chunk, ...] = ()
    batch: int = 0
    context: int = 0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.record.end_ns - self.record.start_ns) / 1e9

    def predicted(self, costs: StepCosts) -> float:
        """How long ``costs`` say."""
        return costs.prefill(self.chunks) if self.chunks else costs.decode(self.batch, self.context)


def size_steps(recording: Recording) -> list[SizedStep]:
    """What was in each step of a run whose requests all arrived at its start.

    A prefill worker takes its prompts in order, so its steps cut the row of them; a decode step made each token that is
    stamped with the step's end.
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
        if record.phase == "prefill":
            sized.append(SizedStep(record, chunks=tuple(cut[record.worker].take(record.tokens))))
        elif contexts := decoded.get((record.worker, record.end_ns)):
            sized.append(SizedStep(record, batch=len(contexts), context=sum(contexts)))
    return sized


class _Row:
    """Prompts of these lengths one after another, of which steps take their tokens."""

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
    """The factors that explain ``steps``: measured over predicted seconds of the steps alone, and of those beside another.

    ``cores`` is None on a GPU. Where no step of a phase was beside another, the factor of those alone stands in, and the
    other way round.
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
        seconds[step.record.phase, beside].append((step.seconds, step.predicted(nearest_costs(costs, count))))

    def factor(phase: Phase, beside: bool) -> float:
        pairs = seconds[phase, beside] or seconds[phase, not beside]
        predicted = sum(each for _, each in pairs)
        return sum(each for each, _ in pairs) / predicted if predicted else 1.0

    return Conditions(
        factor("prefill", False), factor("decode", False), factor("prefill", True), factor("decode", True), _gap(steps)
    )


def _overlap(record: StepRecord, others: Sequence[StepRecord]) -> float:
    """The part of a step's time in which another worker was in a step too (one other worker at a time)."""
    by_worker: dict[str, int] = defaultdict(int)
    for other in others:
        if other.worker != record.worker:
            shared = min(record.end_ns, other.end_ns) - max(record.start_ns, other.start_ns)
            by_worker[other.worker] += max(0, shared)
    return max(by_worker.values(), default=0) / max(1, record.end_ns - record.start_ns)


def _gap(steps: Sequence[SizedStep]) -> float:
    """The median time in seconds between two steps of a worker; the median leaves out the few long waits for work."""
    gaps = []
    for worker in {step.record.worker for step in steps}:
        records = sorted(
            (step.record for step in steps if step.record.worker == worker), key=lambda each: each.start_ns
        )
        gaps += [later.start_ns - earlier.end_ns for earlier, later in pairwise(records)]
    return max(0.0, median(gaps) / 1e9) if gaps else 0.0
