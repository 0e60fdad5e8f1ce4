"""Policies that rank requests: what goes first, and that nobody waits for ever."""

import random
from collections.abc import Sequence

import pytest

from splitwiser.engine.messages import PrefillTask
from splitwiser.engine.policy import POLICIES, PendingPrompt, Policy, WaitingRequest, find_policy
from splitwiser.engine.ranked import Deadline, Priority, Ranked, ShortestPrompt, ShortestRemaining
from splitwiser.engine.steps import SequenceState
from splitwiser.placement.layout import ONE_MIXED, ONE_OF_EACH, WorkerLayout
from splitwiser.request import Request, RequestOutput, SamplingParams
from splitwiser.study.simulate import Conditions, Machine, Setup, simulate
from splitwiser.study.step_times import StepCosts

RANKED = [name for name in POLICIES if name != "first_come"]


def request(
    number: int,
    prompt: int = 1,
    new: int = 1,
    *,
    priority: int = 0,
    target_ms: float | None = None,
    predicted: int | None = None,
    arrival_s: float = 0,
) -> Request:
    params = SamplingParams(max_tokens=new)
    return Request(
        number,
        (1,) * prompt,
        params,
        0,
        arrival_s,
        priority=priority,
        ttft_target_ms=target_ms,
        predicted_tokens=predicted,
    )


def waiting(requests: Sequence[Request]) -> list[WaitingRequest]:
    return [WaitingRequest(each, round(each.arrival_s * 1e9)) for each in requests]


def order(policy: Policy, requests: Sequence[Request], now_s: float = 0) -> list[int]:
    return [each.request.request_id for each in policy.admission_order(waiting(requests), round(now_s * 1e9))]


@pytest.mark.parametrize(
    ("policy", "requests", "expected"),
    [
        (ShortestPrompt(), [request(0, 9), request(1, 2, 90), request(2, 5)], [1, 2, 0]),
        (ShortestRemaining(), [request(0, 9), request(1, 2, 90), request(2, 5)], [2, 0, 1]),
        (
            ShortestRemaining(),
            [request(0, 9), request(1, 2, 90, predicted=6), request(2, 5, 3, predicted=2)],
            [2, 1, 0],
        ),
        (Priority(), [request(0), request(1, priority=-3), request(2, priority=2)], [1, 0, 2]),
        (Deadline(ttft_target_ms=500), [request(0), request(1, target_ms=100), request(2, target_ms=900)], [1, 0, 2]),
        (Deadline(), [request(0, target_ms=900), request(1, target_ms=100, arrival_s=1)], [0, 1]),
        (ShortestPrompt(), [request(0, 4, arrival_s=1), request(1, 4)], [1, 0]),  # of equal ones the first to arrive
    ],
)
def test_the_lowest_rank_goes_first(policy: Policy, requests: list[Request], expected: list[int]) -> None:
    assert order(policy, requests) == expected


def test_what_a_preempted_request_has_made_is_prefilled_and_not_generated_again() -> None:
    fresh, preempted, surprising = (
        WaitingRequest(each, 0) for each in (request(0, 4, 9), request(1, 4, 9), request(2, 4, 9, predicted=2))
    )
    preempted.token_ids = surprising.token_ids = [5] * 3
    assert [ShortestRemaining().rank(each) for each in (fresh, preempted, surprising)] == [13, 13, 8]


def test_prompts_are_packed_in_the_same_order_by_what_they_have_left() -> None:
    prompts = [
        PendingPrompt(each, 0, task=PrefillTask(each, (), "decode-0", 0), sequence=SequenceState(each, ()))
        for each in (request(0, 30), request(1, 6), request(2, 7))
    ]
    prompts[0].done = 28
    packed = ShortestPrompt().pack(prompts, 10, now_ns=0)
    assert [(prompt.request.request_id, tokens) for prompt, tokens in packed] == [(0, 2), (1, 6)]


def test_who_has_waited_long_enough_goes_first_in_order_of_arrival() -> None:
    requests = [
        request(0, 9, arrival_s=0),
        request(1, 5, arrival_s=1),
        request(2, 7, arrival_s=4),
        request(3, 1, arrival_s=5),
    ]
    policy = ShortestPrompt(ageing_s=5)
    assert order(policy, requests, now_s=4.9) == [3, 1, 2, 0]
    assert order(policy, requests, now_s=5) == [0, 3, 1, 2]
    assert order(policy, requests, now_s=9) == [0, 1, 2, 3]


def served(
    requests: Sequence[Request], policy: Policy, layout: WorkerLayout, blocks: int, batch: int
) -> list[RequestOutput]:
    """The outputs of the engine's own loop and workers in simulated time: a prefill step takes 10 ms and 1 ms a token, a
    decode step 20 ms; blocks of four tokens, prefill steps of at most eight."""
    costs = StepCosts((0.010, 0.001, 0, 0, 0), ((1, 0.020, 0),))
    machine = Machine({1: costs}, cores=None, blocks=blocks, block_tokens=4)
    return simulate(requests, machine, Setup(layout, 8, batch, policy=policy), Conditions())


def test_a_large_request_gets_its_blocks_though_small_ones_keep_coming() -> None:
    small = [request(number, 4, 5, arrival_s=0.05 * number) for number in range(60)]  # two blocks each, of six
    large = request(60, 12, 9, arrival_s=0.01)  # five blocks
    wait_s = {}
    for ageing_s in (0.5, float("inf")):
        output = served([*small, large], ShortestRemaining(ageing_s), ONE_OF_EACH, blocks=6, batch=8)[-1]
        wait_s[ageing_s] = output.metrics.queue_ms / 1e3
    assert 0.5 < wait_s[0.5] < 1  # and the time that blocks in use take to be free
    assert wait_s[float("inf")] > 2.9  # after the last of the small ones


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("layout", [ONE_MIXED, ONE_OF_EACH], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_every_request_is_answered_and_nobody_is_overtaken_for_longer_than_the_bound(
    seed: int, layout: WorkerLayout, name: str
) -> None:
    draw = random.Random(f"{seed} {layout} {name}")
    ageing_s = draw.choice([0, 0.1, 0.5])
    requests = [
        request(
            number, draw.randint(1, 30), draw.randint(1, 12), priority=draw.randint(-2, 2),
            target_ms=draw.choice([None, 50, 5000]), arrival_s=draw.uniform(0, 1.5),
        )
        for number in range(40)
    ]  # fmt: skip
    policy = find_policy(f"{name}:ageing_s={ageing_s}")
    outputs = served(requests, policy, layout, blocks=draw.randint(11, 40), batch=draw.randint(1, 8))
    assert [len(output.token_ids) for output in outputs] == [each.max_tokens for each in requests]  # all, each once
    times = [(output.metrics.arrival_ns, output.metrics.prefill_start_ns) for output in outputs]
    overtaken = [
        (first, second)
        for first in times
        for second in times
        if second[0] >= first[0] + ageing_s * 1e9 and second[1] < first[1]
    ]
    assert not overtaken


def test_a_policy_of_ones_own_is_a_rank() -> None:
    class Latest(Ranked):
        def rank(self, waiting: WaitingRequest) -> float:
            return -waiting.arrival_ns

    assert order(Latest(), [request(0), request(1, arrival_s=1)], now_s=1) == [1, 0]
