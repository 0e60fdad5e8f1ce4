"""Predicted runs against schedules worked by hand, and against what the real engine does."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from splitwiser import LLM, constants
from splitwiser.engine.policy import find_policy
from splitwiser.engine.schedule import SCHEDULES, Hybrid, find_schedule
from splitwiser.placement.layout import ONE_MIXED, ONE_OF_EACH, WorkerGroup, WorkerLayout
from splitwiser.request import Request, RequestOutput, SamplingParams
from splitwiser.study.simulate import Conditions, Machine, Setup, simulate
from splitwiser.study.step_times import StepCosts
from tests.support.assertions import assert_says, refusal
from tests.support.observers import Seen

# a prefill step takes 10 ms and 1 ms a token, a decode step 20 ms; with two threads half of that
ONE_THREAD = StepCosts((0.010, 0.001, 0, 0, 0), ((1, 0.020, 0),))
TWO_THREADS = StepCosts((0.005, 0.0005, 0, 0, 0), ((1, 0.010, 0),))
PLAIN = Conditions()
DEVICE = Machine({1: ONE_THREAD}, cores=None, blocks=1000)
TWO_CORES = Machine({1: ONE_THREAD, 2: TWO_THREADS}, cores=2, blocks=1000)


def request(number: int, prompt: int, new: int = 3, arrival_s: float = 0.0) -> Request:
    return Request(number, (1,) * prompt, SamplingParams(max_tokens=new), seed=0, arrival_s=arrival_s)


PAIR = [request(0, 5), request(1, 3)]


def token_ms(
    requests: Sequence[Request],
    layout: WorkerLayout,
    *,
    machine: Machine = DEVICE,
    prefill_tokens: int = 6,
    max_batch: int = 64,
    lend: bool = True,
    conditions: Conditions = PLAIN,
    output_tokens: Mapping[int, int] | None = None,
) -> list[list[float]]:
    """When each request's tokens come."""
    setup = Setup(layout, prefill_tokens, max_batch, lend)
    outputs = simulate(requests, machine, setup, conditions, output_tokens)
    return [[moment / 1e6 for moment in output.metrics.token_ns] for output in outputs]


def test_both_prompts_fit_one_step() -> None:
    times = token_ms(PAIR, ONE_MIXED, prefill_tokens=100)
    assert times == [[18, 38, 58], [18, 38, 58]]


def test_a_mixed_worker_alternates() -> None:
    # 5 + 3 tokens exceed the budget of 6: prefill 0-15, decode 15-35, prefill 35-48, decode 48-68, 68-88
    assert token_ms(PAIR, ONE_MIXED) == [[15, 35, 68], [48, 68, 88]]


def test_a_long_prompt_is_split_and_decode_goes_on_between() -> None:
    # prefill 0-11 of one token; then the chunks 6, 6, 3 of the second, a decode step of the first after each
    times = token_ms([request(0, 1, new=4), request(1, 15, new=2)], ONE_MIXED)
    assert times == [[11, 31, 67, 103], [116, 136]]


def test_split_workers_run_side_by_side() -> None:
    # prefill 0-15, 15-28; decode 15-35 of the first, then of both
    assert token_ms(PAIR, ONE_OF_EACH) == [[15, 35, 55], [28, 55, 75]]


def test_steps_side_by_side_slow_each_other_for_as_long_as_both_last() -> None:
    # from 15 on both at half speed: the prefill's 13 ms last to 41, when 7 ms of the decode step's 20 are left
    conditions = Conditions(prefill_beside=2, decode_beside=2)
    assert token_ms(PAIR, ONE_OF_EACH, conditions=conditions) == [[15, 48, 68], [41, 68, 88]]


def test_steps_alone_have_a_factor_of_their_own() -> None:
    conditions = Conditions(prefill_alone=2, decode_alone=3)
    assert token_ms([request(0, 5)], ONE_OF_EACH, conditions=conditions) == [[30, 90, 150]]


def test_the_time_between_two_turns_counts_once_a_turn() -> None:
    assert token_ms([request(0, 5)], ONE_MIXED, conditions=Conditions(gap_s=0.001)) == [[15, 35, 56]]


def test_idle_workers_lend_their_cores() -> None:
    # the first prefill has both cores; then each worker one: prefill 7.5-20.5, decode 7.5-27.5; then decode has both
    assert token_ms(PAIR, ONE_OF_EACH, machine=TWO_CORES) == [[7.5, 27.5, 37.5], [20.5, 37.5, 47.5]]


def test_without_lending_each_keeps_its_own() -> None:
    assert token_ms(PAIR, ONE_OF_EACH, machine=TWO_CORES, lend=False) == [[15, 35, 55], [28, 55, 75]]


def test_one_worker_has_all_cores() -> None:
    assert token_ms(PAIR, ONE_MIXED, machine=TWO_CORES) == [[7.5, 17.5, 34], [24, 34, 44]]


def test_more_threads_than_cores_share_them() -> None:
    three = WorkerLayout((WorkerGroup("mixed", 3),))
    times = token_ms([request(n, 5, new=1) for n in range(3)], three, machine=TWO_CORES, lend=False)
    assert times == [[22.5], [22.5], [22.5]]  # 15 ms at two thirds


def test_steps_take_longer_behind_more_tokens() -> None:
    # a prefill step: 10 ms, 1 ms a token, 2 ms a chunk, 0.1 ms a pair of tokens, 0.5 ms a pair in a later chunk; a decode
    # step: 20 ms and 1 ms a token before it
    costs = StepCosts((0.010, 0.001, 0.002, 0.0001, 0.0005), ((1, 0.020, 0.001),))
    times = token_ms([request(0, 7)], ONE_MIXED, machine=Machine({1: costs}, None, 1000), prefill_tokens=4)
    # 4 tokens of 10 pairs: 17; 3 of 3 x 4 + 6 pairs: 15 + 9; then behind 8 and behind 9 tokens
    assert times == [pytest.approx([41, 41 + 28, 41 + 28 + 29])]


def test_room_of_what_ended_is_room_again() -> None:
    two = WorkerLayout((WorkerGroup("mixed", 2),))
    batch = [request(0, 500), request(1, 5), request(2, 5, arrival_s=9), request(3, 5, arrival_s=9)]
    outputs = simulate(batch, DEVICE, Setup(two, 1000, 64), PLAIN)
    assert [output.metrics.decode_worker for output in outputs] == ["mixed-0", "mixed-1"] * 2


def test_a_request_is_not_taken_up_before_it_arrives() -> None:
    times = token_ms([request(0, 5), request(1, 3, arrival_s=1)], ONE_OF_EACH)
    assert times == [[15, 35, 55], [1013, 1033, 1053]]


def test_a_request_that_arrives_during_a_step_waits_for_its_end() -> None:
    assert token_ms([request(0, 5), request(1, 3, arrival_s=0.016)], ONE_MIXED) == [[15, 35, 68], [48, 68, 88]]


def test_a_full_batch_makes_the_next_wait() -> None:
    assert token_ms(PAIR, ONE_MIXED, max_batch=1) == [[15, 35, 55], [68, 88, 108]]


def test_a_full_pool_makes_the_next_wait() -> None:
    small = Machine({1: ONE_THREAD}, cores=None, blocks=3, block_tokens=4)  # 7 and 5 positions: two blocks each
    assert token_ms(PAIR, ONE_MIXED, machine=small) == [[15, 35, 55], [68, 88, 108]]


def test_a_request_that_ends_early_makes_room() -> None:
    times = token_ms(PAIR, ONE_MIXED, max_batch=1, output_tokens={0: 2, 1: 1})
    assert times == [[15, 35], [48]]


def test_a_request_that_never_fits_is_refused() -> None:
    small = Machine({1: ONE_THREAD}, cores=None, blocks=3, block_tokens=4)
    two = WorkerLayout((WorkerGroup("mixed", 2),))  # each owns one block
    message = refusal(simulate, PAIR, small, Setup(two, 6, 64), PLAIN)
    assert_says(message, "room for 7 tokens", "owns 4", "kv_memory")


def workload(seed: int, count: int = 40) -> list[Request]:
    rng = random.Random(seed)
    return [
        request(n, rng.randrange(1, 200), rng.randrange(1, 20), rng.choice([0.0, rng.uniform(0, 2)]))
        for n in range(count)
    ]


LAYOUTS = [ONE_MIXED, ONE_OF_EACH, WorkerLayout((WorkerGroup("mixed", 3),)),
           WorkerLayout((WorkerGroup("prefill", 2), WorkerGroup("decode", 2)))]  # fmt: skip
CONDITIONS = Conditions(1.1, 1.2, 1.7, 1.5, 0.001)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_token_comes_once_and_blocks_are_never_over_committed(layout: WorkerLayout, seed: int) -> None:
    machine = Machine({1: ONE_THREAD, 2: TWO_THREADS}, cores=2, blocks=120, block_tokens=8)
    requests, seen = workload(seed), Seen()
    outputs = simulate(requests, machine, Setup(layout, 64, 8, reserve=True), CONDITIONS, observer=seen)
    assert [len(output.token_ids) for output in outputs] == [each.max_tokens for each in requests]
    for output, each in zip(outputs, requests, strict=True):
        times = [each.arrival_s * 1e9, output.metrics.prefill_start_ns, *output.metrics.token_ns]
        assert times == sorted(times)
    by_phase = {phase: [step for step in seen.steps if step.phase == phase] for phase in ("prefill", "decode")}
    assert sum(step.tokens for step in by_phase["prefill"]) == sum(len(each.prompt_token_ids) for each in requests)
    assert sum(step.tokens for step in by_phase["decode"]) == sum(each.max_tokens - 1 for each in requests)
    for worker in {step.worker for step in seen.steps}:
        spans = sorted((step.start_ns, step.end_ns) for step in seen.steps if step.worker == worker)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for owner in {output.metrics.decode_worker for output in outputs}:
        held = [
            (-(-each.max_kv_tokens // 8), output.metrics.prefill_start_ns, output.metrics.token_ns[-1])
            for output, each in zip(outputs, requests, strict=True)
            if output.metrics.decode_worker == owner
        ]
        part = 120 // sum(spec.role != "prefill" for spec in layout.workers)
        for _, moment, _ in held:
            at_once = [blocks for blocks, start, end in held if start <= moment < end]
            assert sum(at_once) <= part
            assert len(at_once) <= 8


def test_hybrid_steps_last_as_predicted() -> None:
    # prefill 0-16 of 5 tokens and 1; hybrid: 2 more and the first's token: 10 + 3 < 20, so 16-36; decode to 56 and 76
    setup = Setup(ONE_MIXED, 6, 64, schedule=Hybrid())
    outputs = simulate([request(0, 6), request(1, 3)], DEVICE, setup, PLAIN)
    assert [[moment / 1e6 for moment in output.metrics.token_ns] for output in outputs] == [[16, 36, 56], [36, 56, 76]]


def test_an_itl_target_is_kept_in_simulated_time() -> None:
    setup = Setup(ONE_MIXED, 1000, 64, schedule=Hybrid(), itl_target_s=0.040)
    seen = Seen()
    simulate([request(0, 6, new=100), request(1, 900, arrival_s=0.02)], DEVICE, setup, PLAIN, observer=seen)
    lasted = [(step.end_ns - step.start_ns) / 1e6 for step in seen.steps if step.phase == "hybrid"]
    assert len(lasted) > 20
    assert 36 < lasted[20] <= 40
    assert max(lasted) <= 40


def ends(outputs: Sequence[RequestOutput]) -> list[float]:
    return [output.metrics.token_ns[-1] / 1e9 for output in outputs]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_is_the_same_each_time(layout: WorkerLayout) -> None:
    setup = Setup(layout, 64, 8)
    first, second = (ends(simulate(workload(3), TWO_CORES, setup, CONDITIONS)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_half_the_speed_takes_twice_the_time(layout: WorkerLayout) -> None:
    slow = StepCosts((0.020, 0.002, 0, 0, 0), ((1, 0.040, 0),))
    requests = [request(n, 10 + n) for n in range(12)]
    setup = Setup(layout, 64, 4)
    fast_ends = ends(simulate(requests, DEVICE, setup, PLAIN))
    slow_ends = ends(simulate(requests, Machine({1: slow}, None, 1000), setup, PLAIN))
    assert slow_ends == pytest.approx([2 * end for end in fast_ends])


def test_more_interference_never_ends_a_run_sooner() -> None:
    setup = Setup(ONE_OF_EACH, 64, 8)
    last = [
        max(ends(simulate(workload(4), DEVICE, setup, Conditions(1, 1, beside, beside))))
        for beside in (1.0, 1.3, 2.0, 4.0)
    ]
    assert last == sorted(last)
    assert last[0] < last[-1]


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        *(({"schedule": schedule}, 1) for schedule in SCHEDULES),
        ({"policy": "shortest_remaining:ageing_s=inf"}, 1),
        ({"reserve": True}, 1),
        ({"prefix_caching": True}, 1),
        ({}, 3),
    ],
)
def test_the_schedule_is_the_real_engines(options: dict[str, Any], samples: int, tiny: Callable[[str], Path]) -> None:
    """Which steps ran, with how many requests and tokens: in mode sequential that does not depend on time."""
    prompts = [list(range(1, 2 + (7 * n) % 60)) for n in range(30)]
    params = [SamplingParams(max_tokens=1 + n % 9, ignore_eos=True, n=samples) for n in range(30)]
    real, predicted = Seen(), Seen()
    with LLM(tiny("opt"), mode="sequential", kv_memory="400KiB", max_batch=6, prefill_tokens=40, **options) as llm:
        llm.generate(prompts, params, observer=real)
        assert llm.started.pool is not None
        machine = Machine({1: ONE_THREAD}, None, llm.started.pool.blocks)
        requests = llm.make_requests(prompts, params)
    schedule = options.get("schedule", constants.SCHEDULE)
    planned = {**options, "schedule": find_schedule(schedule), "policy": find_policy(options.get("policy", "fcfs"))}
    simulate(requests, machine, Setup(ONE_MIXED, 40, 6, **planned), Conditions(), observer=predicted)
    steps = [
        [(step.phase, step.requests, step.tokens, step.decode_tokens) for step in seen.steps]
        for seen in (real, predicted)
    ]
    assert steps[1] == steps[0]
    assert len({step.decode_tokens for step in real.steps}) > 2
    assert any(step.phase == "hybrid" for step in real.steps) == (schedule == "hybrid")
