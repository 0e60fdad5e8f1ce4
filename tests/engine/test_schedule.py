"""What a mixed worker runs next, over steps that take a known time."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from splitwiser.engine.messages import PARENT, Cancel, Message, Progress, StepRecord, Submit
from splitwiser.engine.sampling import Sampled
from splitwiser.engine.schedule import (
    ALTERNATE,
    SCHEDULES,
    Hybrid,
    Plan,
    Schedule,
    StepTime,
    Work,
    describe_schedule,
    find_schedule,
    keeps_itl_target,
    measures_budget,
    saturating_tokens,
)
from splitwiser.engine.steps import Chunk, SequenceState
from splitwiser.engine.worker import SchedulerSettings, Worker, build_worker
from splitwiser.errors import RunError
from splitwiser.placement.layout import parse_layout
from splitwiser.request import FinishReason, Request, SamplingParams
from tests.support.assertions import refusal
from tests.support.records import MS
from tests.support.workers import BLOCK, Wire, run

BOTH_MS, TOKEN_MS = 10, 1  # a step takes 10 ms, and 1 ms a prompt token


class Clocked:
    """A stepper whose steps take :data:`BOTH_MS` and :data:`TOKEN_MS`, and ``slow`` times as long."""

    clock_ns = 0
    slow = 1.0

    def prefill(self, chunks: Sequence[Chunk]) -> Sampled:
        return self._run(chunks, [])[0]

    def decode(self, sequences: Sequence[SequenceState]) -> Sampled:
        return self._run([], sequences)[1]

    def hybrid(self, chunks: Sequence[Chunk], sequences: Sequence[SequenceState]) -> tuple[Sampled, Sampled]:
        assert chunks
        assert sequences
        return self._run(chunks, sequences)

    def finish_reason(self, sequence: SequenceState) -> FinishReason | None:
        return "length" if sequence.drawn >= sequence.request.max_tokens else None

    def now_ns(self) -> int:
        return self.clock_ns

    def _run(self, chunks: Sequence[Chunk], sequences: Sequence[SequenceState]) -> tuple[Sampled, Sampled]:
        for chunk in chunks:
            assert chunk.tokens > 0
        self.clock_ns += round((BOTH_MS + TOKEN_MS * sum(chunk.tokens for chunk in chunks)) * self.slow * MS)
        return Sampled([7 for chunk in chunks if chunk.is_last]), Sampled([9] * len(sequences))


class Bench:
    """One mixed worker that goes by ``schedule``."""

    def __init__(
        self,
        schedule: Schedule,
        prompts: Sequence[int],
        *,
        new: int = 3,
        budget: int = 8,
        target_s: float | None = None,
        encoded: bool = False,
    ) -> None:
        self.stepper, self.wire = Clocked(), Wire()
        settings = SchedulerSettings(64, budget, BLOCK, schedule=schedule, itl_target_s=target_s)
        specs = parse_layout("[{role: mixed}]").workers
        self.worker: Worker = build_worker(specs, 0, self.wire.end("mixed-0"), self.stepper, range(2000), settings)
        for number, length in enumerate(prompts):
            self.submit(number, length, new, encoded=encoded)

    def submit(self, number: int, length: int, new: int, *, encoded: bool = False) -> None:
        request = Request(number, (5,) * length, SamplingParams(max_tokens=new), seed=0, encoded=encoded)
        self.wire.boxes["mixed-0"].append(Submit(request, 0))

    def reports(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.wire.boxes[PARENT] if isinstance(message, kind)]

    @property
    def steps(self) -> list[tuple[str, int, int, int]]:
        """Phase, requests, prompt tokens and decode tokens of each step."""
        records = [each for each in self.reports(StepRecord) if isinstance(each, StepRecord)]
        return [(each.phase, each.requests, each.tokens - each.decode_tokens, each.decode_tokens) for each in records]

    @property
    def counts(self) -> dict[int, int]:
        """How many tokens each request got."""
        made: dict[int, int] = {}
        for report in self.reports(Progress):
            assert isinstance(report, Progress)
            for number in [handoff.request_id for handoff in report.handoffs] + [number for number, _ in report.tokens]:
                made[number] = made.get(number, 0) + 1
        return made


def steps_of(
    schedule: str, prompts: Sequence[int], *, new: int = 3, budget: int = 8
) -> list[tuple[str, int, int, int]]:
    bench = Bench(find_schedule(schedule), prompts, new=new, budget=budget)
    run(bench.worker)
    assert bench.counts == dict.fromkeys(range(len(prompts)), new)
    return bench.steps


def test_alternate_takes_turns() -> None:
    assert steps_of("alternate", [8, 8])[:4] == [
        ("prefill", 1, 8, 0), ("decode", 1, 0, 1), ("prefill", 1, 8, 0), ("decode", 2, 0, 2)
    ]  # fmt: skip


def test_prefill_first_decodes_when_no_prompt_waits() -> None:
    assert steps_of("prefill_first", [8, 20]) == [
        ("prefill", 1, 8, 0), ("prefill", 1, 8, 0), ("prefill", 1, 8, 0), ("prefill", 1, 4, 0),
        ("decode", 2, 0, 2), ("decode", 2, 0, 2),
    ]  # fmt: skip


def test_prefill_first_reports_what_ends_with_its_first_token_at_once() -> None:
    bench = Bench(find_schedule("prefill_first"), [8, 8], new=1)
    bench.worker.step_once()
    (report,) = bench.reports(Progress)
    assert isinstance(report, Progress)
    assert report.finished == ((0, "length"),)


def test_decode_first_prefills_when_no_request_runs() -> None:
    assert steps_of("decode_first", [8, 8]) == [
        ("prefill", 1, 8, 0), ("decode", 1, 0, 1), ("decode", 1, 0, 1),
        ("prefill", 1, 8, 0), ("decode", 1, 0, 1), ("decode", 1, 0, 1),
    ]  # fmt: skip


def test_hybrid_fills_each_step_up_to_the_budget() -> None:
    # the first alone, then with a token of each request in decode and parts of as many prompts as fit
    assert steps_of("hybrid", [8, 12, 3, 9], new=6) == [
        ("prefill", 1, 8, 0), ("hybrid", 2, 7, 1), ("hybrid", 3, 7, 1), ("hybrid", 4, 6, 2), ("hybrid", 4, 4, 3),
        ("decode", 4, 0, 4), ("decode", 3, 0, 3), ("decode", 3, 0, 3), ("decode", 2, 0, 2), ("decode", 1, 0, 1),
    ]  # fmt: skip


def test_a_hybrid_step_takes_a_prompt_token_however_many_requests_are_in_decode() -> None:
    steps = steps_of("hybrid", [1, 1, 3], new=20, budget=2)
    assert [step for step in steps if step[0] == "hybrid"] == [("hybrid", 3, 1, 2)] * 3


def test_what_an_encoder_reads_is_whole_in_a_hybrid_step() -> None:
    bench = Bench(Hybrid(), [5, 12, 2], new=6, encoded=True)
    run(bench.worker)
    prompt_tokens = [tokens for _, _, tokens, _ in bench.steps]
    assert prompt_tokens[:3] == [5, 12, 2]  # the third would have had a part of the room behind the second
    assert bench.counts == {0: 6, 1: 6, 2: 6}


@pytest.mark.parametrize("seed", range(20))
def test_cancels_at_random_between_hybrid_steps(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench(Hybrid(), [rng.randrange(1, 30) for _ in range(12)], new=rng.randrange(1, 9))
    for number in rng.sample(range(12), 6):
        for _ in range(rng.randrange(4)):
            bench.worker.step_once()
        bench.wire.boxes["mixed-0"].append(Cancel(number))
    run(bench.worker)  # raises if blocks are leaked
    reports = [report for report in bench.reports(Progress) if isinstance(report, Progress)]
    assert sorted(number for report in reports for number, _ in report.finished) == list(range(12))


def test_a_first_token_of_a_hybrid_step_is_reported_with_it() -> None:
    bench = Bench(Hybrid(), [8, 5])
    for _ in range(2):
        bench.worker.step_once()
    first, second = bench.reports(Progress)
    assert isinstance(first, Progress)
    assert isinstance(second, Progress)
    assert [handoff.request_id for handoff in second.handoffs] == [1]
    assert second.handoffs[0].first_token_ns == second.time_ns
    assert second.tokens == ((0, 9),)


def itl_ms(target_ms: float, *, slow_step: int | None = None) -> list[float]:
    """The times of the hybrid steps of one request in decode while a long prompt is prefilled, in ms."""
    bench = Bench(Hybrid(), [4, 2000], new=1000, budget=1000, target_s=target_ms / 1e3)
    taken: list[float] = []
    while len(taken) < 40:
        bench.stepper.slow = 5.0 if len(taken) == slow_step else 1.0
        before = bench.stepper.clock_ns
        bench.worker.step_once()
        if bench.steps[-1][0] == "hybrid":
            taken.append((bench.stepper.clock_ns - before) / MS)
    return taken


def test_chunks_grow_up_to_the_target_and_not_past_it() -> None:
    taken = itl_ms(50)
    assert taken == sorted(taken)
    assert 45 < taken[-1] <= 50  # 10 ms and 40 tokens


def test_chunks_shrink_to_one_token_where_the_target_cannot_be_kept() -> None:
    assert itl_ms(5)[-1] == BOTH_MS + TOKEN_MS


def test_one_slow_step_costs_half_a_chunk_at_most() -> None:
    taken = itl_ms(50, slow_step=30)
    assert taken[31] - BOTH_MS >= (taken[29] - BOTH_MS) // 2
    assert taken[-1] > 45


def test_a_target_leaves_steps_without_decode_alone() -> None:
    plan = Hybrid().plan(Work(2, 0, 1000, 0.001, StepTime(500, 0, 1.0)))
    assert plan.prefill_tokens == 1000


@pytest.mark.parametrize(
    ("fixed_ms", "token_ms", "budget"),
    [
        (12, 0.2, 1140),  # 12 ms are 5% of 240
        (12, 0.02, 2048),
        (1, 0.2, 256),
        (0, 0.2, 256),
    ],
)
def test_a_step_is_as_large_as_saturates_the_device(fixed_ms: float, token_ms: float, budget: int) -> None:
    assert saturating_tokens(lambda tokens: (fixed_ms + token_ms * tokens) / 1e3, 2048) == budget


def test_steps_that_more_tokens_do_not_lengthen_are_as_large_as_may_be() -> None:
    assert saturating_tokens(lambda tokens: 0.02 - 1e-6 * tokens, 2048) == 2048
    assert saturating_tokens(lambda tokens: 1.0 * tokens, 100) == 100


@pytest.mark.parametrize(("token_ms", "sizes"), [(0.01, [16, 64, 256, 1024]), (0.5, [16, 64, 256]), (10, [16, 64])])
def test_large_steps_are_measured_where_they_take_little_time(token_ms: float, sizes: list[int]) -> None:
    measured: list[int] = []

    def step_s(tokens: int) -> float:
        measured.append(tokens)
        return token_ms * tokens / 1e3

    saturating_tokens(step_s, 2048)
    assert measured == sizes


@dataclass
class Idle:
    """A schedule of the user's own, which plans nothing."""

    weight: int = 1

    def plan(self, work: Work) -> Plan:
        return Plan(0, decodes=False)


def test_a_schedule_that_plans_nothing_is_named() -> None:
    bench = Bench(Idle(), [8])
    with pytest.raises(
        RunError, match="mixed-0: the schedule plans no step while 1 prompts wait and 0 requests are in"
    ):
        bench.worker.step_once()


@dataclass
class Counting:
    """A schedule with state."""

    plans: int = 0

    def plan(self, work: Work) -> Plan:
        self.plans += 1
        return ALTERNATE.plan(work)


def test_each_worker_has_a_schedule_of_its_own() -> None:
    given = Counting()
    bench = Bench(given, [8])
    run(bench.worker)
    assert given.plans == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_schedule_of_the_table_is_found(name: str) -> None:
    assert find_schedule(name).plan(Work(1, 0, 8)).prefill_tokens == 8


def test_a_class_of_ones_own_is_found_with_its_parameters() -> None:
    assert find_schedule(f"{__name__}:Idle:weight=3") == Idle(3)
    assert describe_schedule(f"{__name__}:Idle:weight=3") == {"class": f"{__name__}:Idle", "weight": 3}
    assert describe_schedule("hybrid") == {"class": "splitwiser.engine.schedule:Hybrid"}


def test_which_schedules_keep_a_target_is_known() -> None:
    assert [name for name in SCHEDULES if keeps_itl_target(name)] == ["hybrid"]
    assert keeps_itl_target(f"{__name__}:Idle")  # it may
    assert [name for name in SCHEDULES if measures_budget(name)] == ["hybrid"]
    assert not measures_budget(f"{__name__}:Idle")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hybird", "unknown schedule 'hybird'; did you mean hybrid? known: alternate, "),
        ("collections:OrderedDict", "schedule collections:OrderedDict: has no method plan"),
        ("hybrid:tokens=5", "schedule hybrid:tokens=5: Hybrid has no parameters"),
    ],
)
def test_what_is_no_schedule_is_refused(name: str, words: str) -> None:
    assert words in refusal(find_schedule, name)
