"""Scheduling, tested without a process: workers of every role in one thread, their messages seen."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from splitwiser.engine.decode import Decoder
from splitwiser.engine.messages import (
    PARENT,
    Cancel,
    Drop,
    Dropped,
    Handoff,
    Message,
    PrefillTask,
    Progress,
    StepRecord,
    Submit,
)
from splitwiser.engine.prefill import Prefiller
from splitwiser.engine.sampling import Sampled
from splitwiser.engine.steps import Chunk, ModelStepper, SequenceState
from splitwiser.engine.worker import Worker, run_worker
from splitwiser.model.compatibility import attach_engine
from splitwiser.model.kv_pool import BlockAllocator, KVPool
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.request import FinishReason, Request, SamplingParams
from tests.support.tokens import prompts_of, references
from tests.support.workers import BLOCK, End, Wire, run


class Bench:
    """A model and pool with the workers that are asked for."""

    def __init__(self, directory: Path, blocks: int = 64) -> None:
        self.model: LoadedModel = load_model(directory, dtype="float32", device="cpu", load_format="auto")
        self.pool = KVPool(attach_engine(self.model), blocks, BLOCK, self.model.dtype, self.model.device)
        self.stepper = ModelStepper(self.model, self.pool)
        self.wire = Wire()

    def prefiller(self, name: str, budget: int = 1000) -> Prefiller:
        return Prefiller(name, self.stepper, budget)

    def decoder(self, name: str, first: int = 0, count: int | None = None, max_batch: int = 100) -> Decoder:
        allocator = BlockAllocator(first, self.pool.blocks if count is None else count)
        return Decoder(name, self.stepper, allocator, BLOCK, max_batch)

    def worker(
        self, name: str, prefiller: Prefiller | None, decoder: Decoder | None, prefill_workers: tuple[str, ...] = ()
    ) -> Worker:
        return Worker(name, self.wire.end(name), prefiller=prefiller, decoder=decoder, prefill_workers=prefill_workers)

    def submit(self, name: str, prompts: list[list[int]], max_tokens: int, first_id: int = 0) -> None:
        for number, prompt in enumerate(prompts, start=first_id):
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
            self.wire.boxes[name].append(Submit(Request(number, tuple(prompt), params, seed=number), 0))

    def reports(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.wire.boxes[PARENT] if isinstance(message, kind)]

    def tokens(self) -> dict[int, list[int]]:
        made: dict[int, list[int]] = {}
        for progress in self.reports(Progress):
            assert isinstance(progress, Progress)
            for handoff in progress.handoffs:
                made[handoff.request_id] = [handoff.first_token]
            for request_id, token in progress.tokens:
                made[request_id].append(token)
        return made


@pytest.fixture
def bench(tiny: Callable[[str], Path]) -> Bench:
    return Bench(tiny("llama"))


def test_separate_workers_make_the_same_tokens(bench: Bench, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([3, 21, 9, 1, 14])
    prefill = bench.worker("prefill-0", bench.prefiller("prefill-0", budget=8), None)
    decode = bench.worker("decode-0", None, bench.decoder("decode-0"), ("prefill-0",))
    bench.submit("decode-0", prompts, 12)
    run(decode, prefill)
    made = bench.tokens()
    expected = references(tiny("llama"), prompts, 12)
    for number, tokens in enumerate(expected):  # generate ends at end-of-sequence, these requests do not
        assert made[number][: len(tokens)] == tokens


def test_two_decode_workers_have_a_part_of_the_pool_each(bench: Bench, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([3, 21, 9, 1, 14, 8])
    prefills = [bench.worker(name, bench.prefiller(name), None) for name in ("prefill-0", "prefill-1")]
    names = ("prefill-0", "prefill-1")
    decodes = [
        bench.worker(name, None, bench.decoder(name, first, 32), names)
        for name, first in (("decode-0", 0), ("decode-1", 32))
    ]
    bench.submit("decode-0", prompts[:3], 10)
    bench.submit("decode-1", prompts[3:], 10, first_id=3)
    run(*decodes, *prefills)
    tasks = [(to, message) for to, message in bench.wire.sent if isinstance(message, PrefillTask)]
    for _, task in tasks:
        own = range(32) if task.decode_worker == "decode-0" else range(32, 64)
        assert set(task.blocks) <= set(own)
    assert {to for to, _ in tasks} == set(names)
    made = bench.tokens()
    for number, tokens in enumerate(references(tiny("llama"), prompts, 10)):
        assert made[number][: len(tokens)] == tokens


def test_a_mixed_worker_alternates(bench: Bench) -> None:
    worker = bench.worker("mixed-0", bench.prefiller("mixed-0", budget=10), bench.decoder("mixed-0"))
    bench.submit("mixed-0", prompts_of([10, 10, 10]), 6)
    run(worker)
    phases = [record.phase for record in bench.reports(StepRecord) if isinstance(record, StepRecord)]
    assert phases[:6] == ["prefill", "decode"] * 3
    assert set(phases[6:]) == {"decode"}


def test_whole_prompts_are_packed_up_to_the_budget(bench: Bench) -> None:
    worker = bench.worker("mixed-0", bench.prefiller("mixed-0", budget=20), bench.decoder("mixed-0"))
    bench.submit("mixed-0", prompts_of([8, 12, 5, 16, 3]), 1)
    run(worker)
    records = [record for record in bench.reports(StepRecord) if isinstance(record, StepRecord)]
    assert [(record.requests, record.tokens) for record in records] == [(2, 20), (1, 5), (2, 19)]


def test_a_prompt_over_the_budget_is_split_and_its_rest_shared(bench: Bench) -> None:
    worker = bench.worker("mixed-0", bench.prefiller("mixed-0", budget=20), bench.decoder("mixed-0"))
    bench.submit("mixed-0", prompts_of([50, 7, 9]), 1)
    run(worker)
    records = [record for record in bench.reports(StepRecord) if isinstance(record, StepRecord)]
    assert [(record.requests, record.tokens) for record in records] == [(1, 20), (1, 20), (2, 17), (1, 9)]


def test_handoffs_carry_the_prefill_times(bench: Bench) -> None:
    worker = bench.worker("mixed-0", bench.prefiller("mixed-0", budget=20), bench.decoder("mixed-0"))
    bench.submit("mixed-0", prompts_of([50]), 1)
    run(worker)
    (progress,) = bench.reports(Progress)
    steps = [record for record in bench.reports(StepRecord) if isinstance(record, StepRecord)]
    assert isinstance(progress, Progress)
    (handoff,) = progress.handoffs
    assert (handoff.prefill_start_ns, handoff.first_token_ns) == (steps[0].start_ns, steps[-1].end_ns)


def test_requests_wait_in_order_for_blocks(bench: Bench) -> None:
    decoder = bench.decoder("decode-0", count=6)
    for number, length in enumerate([8, 14, 1, 1]):  # with 4 new tokens: 3, 5, 1 and 1 blocks of 4
        decoder.submit(Request(number, tuple(range(length)), SamplingParams(max_tokens=4, ignore_eos=True), 0), 0)
    assert [task.request.request_id for task in decoder.admit()] == [0]  # the later, smaller ones do not overtake
    assert decoder.admit() == []
    decoder.receive(Handoff(0, 5, 1, 2, "prefill-0"))
    while decoder.step():
        pass
    assert [task.request.request_id for task in decoder.admit()] == [1, 2]


def test_max_batch_counts_requests_that_are_being_prefilled(bench: Bench) -> None:
    decoder = bench.decoder("decode-0", max_batch=2)
    for number in range(3):
        decoder.submit(Request(number, (1, 2), SamplingParams(max_tokens=4, ignore_eos=True), 0), 0)
    assert len(decoder.admit()) == 2
    decoder.receive(Handoff(0, 5, 1, 2, "prefill-0"))
    assert decoder.admit() == []


def test_a_request_of_one_token_takes_no_decode_step(bench: Bench) -> None:
    decoder = bench.decoder("decode-0")
    decoder.submit(Request(0, (1, 2), SamplingParams(max_tokens=1), 0), 0)
    decoder.admit()
    decoder.receive(Handoff(0, 5, 1, 2, "prefill-0"))
    result = decoder.step()
    assert result is not None
    assert result.requests == 0
    assert result.progress.finished == ((0, "length"),)
    assert decoder.step() is None


class _Once(End):
    """A transport that stops as soon as there is nothing more to do, and a share that counts its uses."""

    stopped = False
    uses = 0

    def wait(self) -> None:
        self.stopped = True

    @contextmanager
    def use(self) -> Iterator[None]:
        self.uses += 1
        yield

    def release(self) -> None:
        pass


def test_a_worker_uses_its_share_only_for_steps(bench: Bench) -> None:
    bench.worker("prefill-0", bench.prefiller("prefill-0"), None)
    end = _Once(bench.wire, "decode-0")
    bench.wire.boxes["decode-0"] = deque()
    worker = Worker("decode-0", end, decoder=bench.decoder("decode-0"), prefill_workers=("prefill-0",))
    bench.submit("decode-0", [[1, 2]], max_tokens=2)
    run_worker(worker, end, end)
    assert [type(message) for message in bench.wire.boxes["prefill-0"]] == [PrefillTask]
    assert end.uses == 0
    end.stopped = False
    bench.wire.boxes["decode-0"].append(Handoff(0, 5, 1, 2, "prefill-0"))
    run_worker(worker, end, end)
    assert bench.tokens().keys() == {0}
    assert end.uses == 1


def test_a_worker_refuses_a_message_that_is_not_for_its_role(bench: Bench) -> None:
    worker = bench.worker("prefill-0", bench.prefiller("prefill-0"), None)
    bench.submit("prefill-0", [[1]], 1)
    with pytest.raises(TypeError, match="prefill-0 \\(prefill\\) cannot handle Submit"):
        worker.step_once()


def queue(bench: Bench, lengths: list[int], budget: int) -> Worker:
    """A prefill worker with prompts of ``lengths``, which it has received."""
    bench.wire.end("decode-0")
    worker = bench.worker("prefill-0", bench.prefiller("prefill-0", budget), None)
    for number, prompt in enumerate(prompts_of(lengths)):
        request = Request(number, tuple(prompt), SamplingParams(max_tokens=2), seed=0)
        blocks = tuple(range(8 * number, 8 * number + 8))
        bench.wire.boxes["prefill-0"].append(PrefillTask(request, blocks, "decode-0", 0))
    worker.receive()
    return worker


@pytest.mark.parametrize(("lengths", "told"), [([8, 8], False), ([8, 8, 1], True)])
def test_a_step_that_leaves_more_than_another_takes_tells_of_a_backlog(
    lengths: list[int], told: bool, bench: Bench
) -> None:
    worker = queue(bench, lengths, budget=8)
    calls: list[None] = []
    worker.on_backlog = lambda: calls.append(None)
    worker.run_planned()
    assert bool(calls) is told


def test_a_second_lane_takes_prompts_whose_turn_is_late(bench: Bench) -> None:
    worker = queue(bench, [8, 8, 8, 8], budget=8)
    assert worker.run_second_prefill()
    worker.run_planned()
    assert [message.request_id for message in bench.wire.boxes["decode-0"] if isinstance(message, Handoff)] == [2, 0]
    records = [message for message in bench.reports(StepRecord) if isinstance(message, StepRecord)]
    assert [record.worker for record in records] == ["prefill-0-second", "prefill-0"]


def test_steps_at_the_same_time_have_different_prompts(bench: Bench) -> None:
    prefiller = bench.prefiller("prefill-0", 8)
    for number, prompt in enumerate(prompts_of([8, 8, 20])):
        request = Request(number, tuple(prompt), SamplingParams(max_tokens=2), seed=0)
        prefiller.add(PrefillTask(request, tuple(range(8 * number, 8 * number + 8)), "decode-0", 0))
    taken = [prefiller.take(8, late=True), prefiller.take(8), prefiller.take(8), prefiller.take(8)]
    assert [[each.request.request_id for each, _ in packed] for packed in taken] == [[1], [0], [2], []]
    assert prefiller.waiting == 0
    assert prefiller.drop(2, "decode-0") is None  # a step writes to its blocks
    prefiller.record(taken[2], Sampled([]), 1, 2)
    assert prefiller.waiting == 1
    assert prefiller.drop(2, "decode-0") is not None


class Pair:
    """A prefill and a decode worker with one request, of 20 prompt tokens in steps of 8."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.allocator = BlockAllocator(0, bench.pool.blocks)
        decoder = Decoder("decode-0", bench.stepper, self.allocator, BLOCK, 100)
        self.prefill = bench.worker("prefill-0", bench.prefiller("prefill-0", budget=8), None)
        self.decode = bench.worker("decode-0", None, decoder, ("prefill-0",))
        bench.submit("decode-0", prompts_of([20]), 6)

    def cancel(self) -> None:
        self.bench.wire.boxes["decode-0"].appendleft(Cancel(0))  # before what is on its way

    def sent(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for _, message in self.bench.wire.sent)

    @property
    def is_free(self) -> bool:
        return self.allocator.free_count == self.allocator.count

    @property
    def finished(self) -> list[tuple[int, str]]:
        reports = [report for report in self.bench.reports(Progress) if isinstance(report, Progress)]
        return [each for report in reports for each in report.finished]


def test_cancelled_while_it_waits(bench: Bench) -> None:
    pair = Pair(bench)
    bench.wire.boxes["decode-0"].append(Cancel(0))
    pair.decode.step_once()
    assert pair.finished == [(0, "cancelled")]
    assert pair.sent(PrefillTask) == 0


def test_cancelled_under_prefill_keeps_its_blocks_until_prefill_lets_go(bench: Bench) -> None:
    pair = Pair(bench)
    pair.decode.step_once()
    pair.prefill.step_once()  # a part of the prompt
    pair.cancel()
    pair.decode.step_once()
    assert (pair.finished, pair.is_free) == ([], False)
    assert not pair.prefill.step_once()  # the rest is dropped
    pair.decode.step_once()
    assert (pair.finished, pair.is_free) == ([(0, "cancelled")], True)
    assert (pair.sent(Dropped), pair.sent(Handoff)) == (1, 0)


def test_cancelled_while_its_handoff_is_on_its_way(bench: Bench) -> None:
    pair = Pair(bench)
    pair.decode.step_once()
    while pair.prefill.step_once():
        continue
    pair.cancel()
    pair.decode.step_once()
    assert (pair.finished, pair.is_free) == ([(0, "cancelled")], True)
    assert [len(tokens) for tokens in bench.tokens().values()] == [1]
    assert pair.sent(Drop) == 1
    assert not pair.prefill.step_once()  # which has it no more
    assert pair.sent(Dropped) == 0


def test_a_cancel_of_the_run_before_leaves_a_request_of_the_same_id_alone(bench: Bench) -> None:
    pair = Pair(bench)
    pair.decode.step_once()
    bench.wire.boxes["prefill-0"].append(Drop(0, "decode-1"))  # overtaken by the task of another worker
    run(pair.prefill, pair.decode)
    assert pair.finished == [(0, "length")]


def test_cancelled_while_it_runs(bench: Bench) -> None:
    pair = Pair(bench)
    while len(bench.tokens().get(0, [])) < 3:
        pair.decode.step_once()
        pair.prefill.step_once()
    pair.cancel()
    pair.decode.step_once()
    assert (pair.finished, pair.is_free) == ([(0, "cancelled")], True)
    assert len(bench.tokens()[0]) == 3
    pair.cancel()
    assert not pair.decode.step_once()  # it has finished


def test_a_mixed_worker_drops_a_prompt_of_its_own(bench: Bench) -> None:
    worker = bench.worker("mixed-0", bench.prefiller("mixed-0", budget=8), bench.decoder("mixed-0"))
    bench.submit("mixed-0", prompts_of([20, 5]), 3)
    worker.step_once()
    bench.wire.boxes["mixed-0"].append(Cancel(0))
    run(worker)
    finished = [each for report in bench.reports(Progress) if isinstance(report, Progress) for each in report.finished]
    assert finished == [(0, "cancelled"), (1, "length")]


class Instant:
    """A stepper that computes nothing."""

    def prefill(self, chunks: Sequence[Chunk]) -> Sampled:
        return Sampled([9 for chunk in chunks if chunk.is_last])

    def decode(self, sequences: Sequence[SequenceState]) -> Sampled:
        return Sampled([9] * len(sequences))

    def hybrid(self, chunks: Sequence[Chunk], sequences: Sequence[SequenceState]) -> tuple[Sampled, Sampled]:
        return self.prefill(chunks), self.decode(sequences)

    def finish_reason(self, sequence: SequenceState) -> FinishReason | None:
        return "length" if sequence.drawn >= sequence.request.max_tokens else None

    def now_ns(self) -> int:
        return 1


@pytest.mark.parametrize("seed", range(40))
def test_cancels_at_random_between_workers(seed: int) -> None:
    rng = random.Random(seed)
    wire, stepper = Wire(), Instant()
    prefills, decodes = (tuple(f"{role}-{number}" for number in range(2)) for role in ("prefill", "decode"))
    allocators = [BlockAllocator(first, 12) for first in (0, 12)]
    workers = [Worker(name, wire.end(name), prefiller=Prefiller(name, stepper, 8)) for name in prefills] + [
        Worker(name, wire.end(name), decoder=Decoder(name, stepper, allocator, BLOCK, 4), prefill_workers=prefills)
        for name, allocator in zip(decodes, allocators, strict=True)
    ]
    owners = [rng.choice(decodes) for _ in range(12)]
    for number, owner in enumerate(owners):
        params = SamplingParams(max_tokens=rng.randrange(1, 9))
        wire.boxes[owner].append(Submit(Request(number, (5,) * rng.randrange(1, 30), params, seed=0), 0))
    cancelled = set()
    for _ in range(300):
        if rng.random() < 0.1:
            number = rng.randrange(12)
            cancelled.add(number)
            wire.boxes[owners[number]].append(Cancel(number))
        rng.choice(workers).step_once()
    run(*workers)
    finished = [each for _, message in wire.sent if isinstance(message, Progress) for each in message.finished]
    assert sorted(number for number, _ in finished) == list(range(12))
    assert {number for number, reason in finished if reason == "cancelled"} <= cancelled
    assert [allocator.free_count for allocator in allocators] == [12, 12]
