"""Whatever arrives and is cancelled, in whatever order workers get to run: every request is answered once and with the right
tokens, nobody reads what was overwritten, and in the end all blocks are free."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import pytest

pytest.importorskip("hypothesis", reason="needs the extra dev")

from hypothesis import given, settings
from hypothesis import strategies as st

from splitwiser.engine.decode import Decoder
from splitwiser.engine.messages import PARENT, Cancel, PrefillTask, Progress, Submit
from splitwiser.engine.policy import PendingPrompt, Policy, Router, find_policy
from splitwiser.engine.prefill import Packed, Prefiller
from splitwiser.engine.prefixes import may_share
from splitwiser.engine.sampling import Sampled
from splitwiser.engine.schedule import SCHEDULES, find_schedule
from splitwiser.engine.steps import Chunk, SequenceState
from splitwiser.engine.worker import SchedulerSettings, Worker, build_worker
from splitwiser.placement.layout import parse_layout
from splitwiser.request import NO_ADAPTER, Adapter, FinishReason, Request, SamplingParams
from tests.support.workers import BLOCK, Wire, run

LAYOUTS = [
    "[{role: mixed}]",
    "[{role: mixed, count: 2}]",
    "[{role: prefill}, {role: decode}]",
    "[{role: prefill, count: 2}, {role: decode, count: 2}]",
]
POLICIES = [
    "first_come",
    "shortest_prompt:ageing_s=20",
    "shortest_remaining:ageing_s=0",
    "priority:ageing_s=50",
    "deadline:ttft_target_ms=9000,ageing_s=30",
]
VIRTUAL = Adapter("virtual", virtual_tokens=6, blocks=(900, 901), tail_tokens=2)
LORA = Adapter("lora", lora=1)
ADAPTERS = [NO_ADAPTER, LORA, VIRTUAL]
S = 1_000_000_000


class Remembering:
    """A stepper whose pool holds, in the place of each K and V, the number of all tokens up to there, and whose steps fail
    if a request does not find its own. The next token follows from all before it."""

    def __init__(self, ends: dict[int, int]) -> None:
        self.ends = ends
        self.pool: dict[int, int] = {}
        self.clock_ns = 0

    def prefill(self, chunks: Sequence[Chunk]) -> Sampled:
        self.clock_ns += S
        for chunk in chunks:
            assert chunk.tokens, f"{chunk.sequence.request} has nothing to compute, and so no logits"
            self._compute(chunk.sequence, chunk.start, chunk.end)
        return Sampled([following(chunk.sequence) for chunk in chunks if chunk.is_last])

    def decode(self, sequences: Sequence[SequenceState]) -> Sampled:
        self.clock_ns += S
        for sequence in sequences:
            self._compute(sequence, sequence.length - 1, sequence.length)
        return Sampled([following(sequence) for sequence in sequences])

    def hybrid(self, chunks: Sequence[Chunk], sequences: Sequence[SequenceState]) -> tuple[Sampled, Sampled]:
        return self.prefill(chunks), self.decode(sequences)

    def finish_reason(self, sequence: SequenceState) -> FinishReason | None:
        return "length" if sequence.drawn >= self.ends[sequence.request.request_id] else None

    def now_ns(self) -> int:
        return self.clock_ns

    def _compute(self, sequence: SequenceState, start: int, end: int) -> None:
        held = histories(sequence)
        for place in range(end):
            block, offset = divmod(place + sequence.request.adapter.tail_tokens, BLOCK)
            slot = sequence.own_blocks[block] * BLOCK + offset
            if place < start:
                assert self.pool[slot] == held[place], f"{sequence.request} reads what is not its own"
            self.pool[slot] = held[place]


def histories(sequence: SequenceState) -> list[int]:
    """For each token, a number of all tokens up to it."""
    number = ADAPTERS.index(sequence.request.adapter)
    return [number := hash((number, token)) for token in sequence.tokens(0, sequence.length)]


def following(sequence: SequenceState) -> int:
    return histories(sequence)[-1] % 97


def expected(request: Request, end: int) -> list[int]:
    sequence = SequenceState(request, ())
    for _ in range(end):
        sequence.token_ids.append(following(sequence))
    return sequence.token_ids


@st.composite
def arriving(draw: Callable[[st.SearchStrategy[int]], int], count: int) -> list[tuple[Request, int, int]]:
    """Requests, each with the number of tokens after which it ends by itself and the step before which it arrives."""
    requests = []
    for number in range(count):
        common = draw(st.integers(0, 20))
        own = draw(st.integers(0 if common else 1, 8))
        prompt = (*range(common), *(100 + number for _ in range(own)))
        most = draw(st.integers(1, 24))
        adapter = ADAPTERS[max(0, draw(st.integers(-2, 2)))]
        priority = draw(st.integers(-1, 1))
        request = Request(number, prompt, SamplingParams(max_tokens=most), 0, adapter=adapter, priority=priority)
        requests.append((request, draw(st.integers(1, most)), draw(st.integers(0, 60))))
    return sorted(requests, key=lambda each: each[2])


def note_admissions(decoder: Decoder) -> list[PrefillTask]:
    """All tasks that ``decoder`` makes from now on."""
    noted: list[PrefillTask] = []
    admit = decoder.admit

    def noting() -> list[PrefillTask]:
        tasks = admit()
        noted.extend(tasks)
        return tasks

    decoder.admit = noting  # type: ignore[method-assign]
    return noted


def hold_to_order(prefiller: Prefiller, policy: Policy) -> None:
    """Have each step of ``prefiller`` fail in which the first prompt by ``policy`` does not go on, nor what it waits for."""
    pack = prefiller.pack

    def packing(budget: int, *, fill: bool = False) -> Packed:
        order = policy.admission_order(prefiller._prompts, prefiller.stepper.now_ns())
        packed = pack(budget, fill=fill)
        first = next(iter(order), None)
        while isinstance(first, PendingPrompt) and first.follows and not first.is_ready:
            first = first.follows
        assert not packed or first in [prompt for prompt, _ in packed]
        return packed

    prefiller.pack = packing  # type: ignore[method-assign]


def serve(
    requests: list[tuple[Request, int, int]],
    layout: str,
    scheduling: SchedulerSettings,
    part: int,
    seed: int,
    cancels: float = 0,
) -> tuple[dict[int, list[int]], set[int], list[list[PrefillTask]]]:
    """Serve ``requests`` by workers that get to run in an order drawn with ``seed``, those that decode with ``part`` blocks
    each; ``cancels`` is the chance before each step that a request is cancelled. Return the tokens of each, which were
    cancelled, and what was admitted by each decode worker."""
    rng, wire, specs = random.Random(seed), Wire(), parse_layout(layout).workers
    stepper = Remembering({request.request_id: end for request, end, _ in requests})
    owners = [spec.name for spec in specs if spec.role != "prefill"]
    workers = []
    for index, spec in enumerate(specs):
        place = owners.index(spec.name) * part if spec.name in owners else 0
        own = range(place, place + part)
        workers.append(build_worker(specs, index, wire.end(spec.name), stepper, own, scheduling))
        if prefiller := workers[-1]._prefiller:
            hold_to_order(prefiller, scheduling.policy)
    decoders = [worker._decoder for worker in workers if worker._decoder]
    admitted = [note_admissions(decoder) for decoder in decoders]
    shares = partial(may_share, prefix_caching=scheduling.prefix_caching)
    router = Router(dict.fromkeys(owners, part), BLOCK, shares)
    waiting, places, cancelled, idle = list(requests), dict[int, str](), set[int](), 0
    tokens: dict[int, list[int]] = {request.request_id: [] for request, *_ in requests}
    finished: Counter[int] = Counter()
    while idle < 50:
        while waiting and (waiting[0][2] * S <= stepper.clock_ns or idle > 10):
            request = waiting.pop(0)[0]
            places[request.request_id] = router.choose(request)
            wire.boxes[places[request.request_id]].append(Submit(request, stepper.clock_ns))
        if places and rng.random() < cancels:
            number = rng.choice(list(places))  # which may have finished
            wire.boxes[places[number]].append(Cancel(number))
        idle = 0 if rng.choice(workers).step_once() else idle + 1
        for message in take(wire, Progress):
            for handoff in message.handoffs:
                tokens[handoff.request_id].append(handoff.first_token)
            for number, token in message.tokens:
                tokens[number].append(token)
            for number, reason in message.finished:
                finished[number] += 1
                router.release(number)
                cancelled |= {number} if reason == "cancelled" else set()
    assert finished == Counter(request.request_id for request, *_ in requests)
    assert all(decoder._allocator.free_count == part for decoder in decoders)
    assert not any(decoder._allocator._references or decoder._known for decoder in decoders)
    return tokens, cancelled, admitted


def take(wire: Wire, kind: type[Progress]) -> list[Progress]:
    """The messages of ``kind`` that the parent has been sent since the last call."""
    box = wire.boxes[PARENT]
    messages = [message for message in box if isinstance(message, kind)]
    box.clear()
    return messages


@given(
    requests=st.integers(1, 12).flatmap(arriving),
    layout=st.sampled_from(LAYOUTS),
    policy=st.sampled_from(POLICIES),
    schedule=st.sampled_from(list(SCHEDULES)),
    spare=st.integers(0, 20),
    batch=st.integers(1, 8),
    budget=st.integers(1, 40),
    reserve=st.booleans(),
    caching=st.booleans(),
    seed=st.integers(0, 1000),
    cancels=st.sampled_from([0, 0.02, 0.2]),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_every_request_is_answered_once_and_all_blocks_are_free_in_the_end(
    requests: list[tuple[Request, int, int]],
    layout: str,
    policy: str,
    schedule: str,
    spare: int,
    batch: int,
    budget: int,
    reserve: bool,
    caching: bool,
    seed: int,
    cancels: float,
) -> None:
    largest = max(-(-request.max_kv_tokens // BLOCK) for request, *_ in requests)
    scheduling = SchedulerSettings(
        batch,
        budget,
        BLOCK,
        find_policy(policy),
        find_schedule(schedule),
        reserve=reserve,
        prefix_caching=caching,
        longest_shared=30,
    )
    tokens, cancelled, admitted = serve(requests, layout, scheduling, largest + spare, seed, cancels)
    for request, end, _ in requests:
        number = request.request_id
        made = len(tokens[number]) if number in cancelled else end
        assert tokens[number] == expected(request, made)
    ageing_s = float(policy.partition("ageing_s=")[2] or 0)
    for tasks in admitted:
        arrivals = {task.request.request_id: task.arrival_ns for task in reversed(tasks)}  # in order of first admission
        order = list(dict.fromkeys(task.request.request_id for task in tasks))
        for place, first in enumerate(order):
            for second in order[place + 1 :]:  # whom it went before
                assert arrivals[first] < arrivals[second] + ageing_s * S or arrivals[first] == arrivals[second]
        if reserve:
            assert len(order) == len(tasks)  # nobody was preempted
    if not caching:
        assert not any(task.cached_tokens or task.follows is not None for tasks in admitted for task in tasks)


def test_the_cases_drawn_are_of_all_kinds() -> None:
    """Preempted ones, prompts that wait for another's prefill, and blocks that are overwritten, in one run."""
    requests = [
        (
            Request(number, (*range(14), 100 + number), SamplingParams(max_tokens=24), 0),
            20 + number % 5,
            number // 4 * 20,
        )
        for number in range(12)
    ]
    scheduling = SchedulerSettings(8, 6, BLOCK, prefix_caching=True)
    tokens, _, (admitted,) = serve(requests, LAYOUTS[2], scheduling, 24, seed=0)
    assert tokens == {request.request_id: expected(request, end) for request, end, _ in requests}
    assert any(task.token_ids for task in admitted)
    assert any(task.follows is not None for task in admitted)
    assert any(task.cached_tokens and task.follows is None for task in admitted)


@pytest.mark.parametrize("layout", LAYOUTS[1::2])
def test_requests_go_to_the_worker_that_has_their_beginning(layout: str) -> None:
    kinds = [random.Random(number).randrange(6) for number in range(40)]
    requests = [
        (
            Request(number, (*range(50 * kind, 50 * kind + 40), 300 + number), SamplingParams(max_tokens=3), 0),
            3,
            2 * number,
        )
        for number, kind in enumerate(kinds)
    ]
    tokens, _, admitted = serve(requests, layout, SchedulerSettings(8, 100, BLOCK, prefix_caching=True), 120, seed=3)
    assert tokens == {request.request_id: expected(request, end) for request, end, _ in requests}
    found = [task.cached_tokens for tasks in admitted for task in tasks]
    assert set(found) == {0, 40}
    assert found.count(0) < 10  # by the load alone, each of two workers would compute each of the six
    assert min(map(len, admitted)) > 9


@pytest.mark.parametrize("caching", [False, True])
def test_a_prompt_that_shares_goes_to_the_worker_that_fills_the_blocks(caching: bool) -> None:
    wire, specs = Wire(), parse_layout("[{role: prefill, count: 2}, {role: decode}]").workers
    scheduling = SchedulerSettings(8, 100, BLOCK, prefix_caching=caching)
    workers: list[Worker] = [
        build_worker(specs, index, wire.end(spec.name), Remembering({}), range(40), scheduling)
        for index, spec in enumerate(specs)
    ]
    for number in range(4):
        request = Request(number, (*range(12), number), SamplingParams(max_tokens=2), 0)
        wire.boxes["decode-0"].append(Submit(request, 0))
    workers[-1].step_once()
    places = [to for to, message in wire.sent if isinstance(message, PrefillTask)]
    assert len(set(places)) == (1 if caching else 2)


@pytest.mark.parametrize("schedule", ["alternate", "hybrid"])
def test_who_fills_the_blocks_of_an_urgent_prompt_goes_before_what_is_less_urgent(schedule: str) -> None:
    prompts = [(*range(12), 100), (200,) * 8, (300,) * 8, (*range(12), 101), (*range(8), 400)]
    wire, specs = Wire(), parse_layout("[{role: mixed}]").workers
    scheduling = SchedulerSettings(
        8, 4, BLOCK, find_policy("priority:ageing_s=inf"), find_schedule(schedule), prefix_caching=True
    )
    stepper = Remembering(dict.fromkeys(range(5), 1))
    worker = build_worker(specs, 0, wire.end("mixed-0"), stepper, range(40), scheduling)
    for number, priority in enumerate([5, 2, 2, 0, 1]):
        request = Request(number, prompts[number], SamplingParams(max_tokens=2), 0, priority=priority)
        wire.boxes["mixed-0"].append(Submit(request, 0))
        if not number:
            worker.step_once()  # the first has begun before the others come
    run(worker)
    handoffs = [handoff.request_id for report in take(wire, Progress) for handoff in report.handoffs]
    assert handoffs == [3, 4, 1, 2, 0]


@pytest.mark.parametrize("waits", [True, False], ids=["waits for its blocks", "comes later"])
def test_who_begins_like_a_cancelled_prompt_is_not_left_without_its_blocks(waits: bool) -> None:
    wire, specs = Wire(), parse_layout("[{role: prefill}, {role: decode}]").workers
    stepper, scheduling = Remembering({0: 2, 1: 2}), SchedulerSettings(8, 4, BLOCK, prefix_caching=True)
    prefill, decode = (
        build_worker(specs, index, wire.end(spec.name), stepper, range(40), scheduling)
        for index, spec in enumerate(specs)
    )
    first, second = (Request(number, (*range(12), number), SamplingParams(max_tokens=2), 0) for number in range(2))
    wire.boxes["decode-0"].append(Submit(first, 0))
    if waits:
        wire.boxes["decode-0"].append(Submit(second, 0))
    decode.step_once()
    prefill.step_once()  # four tokens of the first
    wire.boxes["decode-0"].append(Cancel(0))
    decode.step_once()
    if not waits:
        wire.boxes["decode-0"].append(Submit(second, 0))
        decode.step_once()
    run(prefill, decode)
    reports = take(wire, Progress)
    assert dict(each for report in reports for each in report.finished) == {0: "cancelled", 1: "length"}
    (handoff,) = (handoff for report in reports for handoff in report.handoffs if handoff.request_id == 1)
    assert handoff.cached_tokens == (12 if waits else 0)
    assert decode._decoder is not None
    assert decode._decoder._allocator.free_count == 40


def test_a_prompt_goes_on_if_all_in_decode_wait_for_its_blocks() -> None:
    requests = [
        (Request(0, (1, 2, 3, 4), SamplingParams(max_tokens=14), 0), 14, 0),
        (Request(1, (5,) * 12, SamplingParams(max_tokens=2), 0), 2, 1),
    ]
    scheduling = SchedulerSettings(8, 1, BLOCK, schedule=find_schedule("decode_first"))
    tokens, *_ = serve(requests, LAYOUTS[0], scheduling, 7, seed=0)
    assert tokens == {request.request_id: expected(request, end) for request, end, _ in requests}
