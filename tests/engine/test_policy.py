"""The decisions of scheduling, and that a worker keeps to a policy's order, whatever it is."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from splitwiser.engine.messages import PARENT, PrefillTask, Progress, Submit
from splitwiser.engine.policy import (
    FIRST_COME,
    POLICIES,
    FirstCome,
    PendingPrompt,
    Policy,
    Router,
    WaitingRequest,
    describe_policy,
    find_policy,
    policy_name,
    reads,
)
from splitwiser.engine.prefill import Prefiller
from splitwiser.engine.ranked import Deadline, Priority
from splitwiser.engine.steps import ModelStepper, SequenceState
from splitwiser.engine.worker import SchedulerSettings, build_worker
from splitwiser.errors import RunError
from splitwiser.model.compatibility import attach_engine
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import load_model
from splitwiser.placement.layout import parse_layout
from splitwiser.request import NO_ADAPTER, Adapter, Request, SamplingParams
from tests.support.assertions import refusal
from tests.support.tokens import prompts_of
from tests.support.workers import BLOCK, Wire, run


def pending(*lengths: int, encoded: bool = False) -> list[PendingPrompt]:
    requests = [
        Request(number, (5,) * length, SamplingParams(max_tokens=2), 0, encoded=encoded)
        for number, length in enumerate(lengths)
    ]
    return [
        PendingPrompt(each, 0, task=PrefillTask(each, (), "decode-0", 0), sequence=SequenceState(each, ()))
        for each in requests
    ]


@pytest.mark.parametrize(
    ("lengths", "budget", "packed"),
    [
        ([3, 4, 5], 12, [3, 4, 5]),
        ([3, 4, 5], 11, [3, 4]),
        ([3, 4, 1], 6, [3]),  # the third would fit, but it came after the second
        ([30, 4], 8, [8]),
        ([], 8, []),
    ],
)
def test_first_come_packs_whole_prompts_in_order(lengths: list[int], budget: int, packed: list[int]) -> None:
    prompts = pending(*lengths)
    made = FIRST_COME.pack(prompts, budget, now_ns=0)
    assert [tokens for _, tokens in made] == packed
    assert [prompt for prompt, _ in made] == prompts[: len(packed)]


def test_what_an_encoder_reads_is_not_split() -> None:
    first = FIRST_COME.pack(prompts := pending(30, 4, 5, encoded=True), 8, now_ns=0)
    assert [tokens for _, tokens in first] == [30]  # in a step of its own, and nothing else in it
    assert [tokens for _, tokens in FIRST_COME.pack(prompts[1:], 8, now_ns=0)] == [4]


def test_what_a_prompt_has_left_counts() -> None:
    prompts = pending(30, 4)
    prompts[0].done = 26
    assert [tokens for _, tokens in FIRST_COME.pack(prompts, 8, now_ns=0)] == [4, 4]


def test_a_request_goes_to_the_worker_with_the_most_room() -> None:
    router = Router({"decode-0": 10, "decode-1": 9}, block_tokens=4)
    long = Request(0, (5,) * 17, SamplingParams(max_tokens=4), 0)
    assert router.choose(long) == "decode-0"  # 5 blocks
    assert router.choose(Request(1, (5,), SamplingParams(max_tokens=4), 0)) == "decode-1"
    router.release(0)
    assert router.choose(Request(2, (5,), SamplingParams(max_tokens=4), 0)) == "decode-0"


def beginning(number: int, common: int, prompt: int, new: int = 4, adapter: Adapter = NO_ADAPTER) -> Request:
    """A request of ``prompt`` tokens, of which the first ``common`` are those of others."""
    tokens = (*range(common), *([100 + number] * (prompt - common)))
    return Request(number, tokens, SamplingParams(max_tokens=new), 0, adapter=adapter)


def test_a_request_goes_where_its_beginning_is_unless_another_has_more_room_by_more() -> None:
    router = Router({"decode-0": 40, "decode-1": 40}, block_tokens=4, shares=lambda _: True)
    assert router.choose(beginning(0, 12, 13)) == "decode-0"  # 4 blocks, of which others may find 3
    assert router.choose(beginning(1, 12, 13)) == "decode-1"  # 4 more blocks are free there
    assert router.choose(beginning(2, 12, 13)) == "decode-0"
    router.release(1)
    assert router.choose(beginning(3, 0, 13)) == "decode-1"
    router.release(0)
    router.release(3)
    assert router.choose(beginning(4, 24, 24, new=1)) == "decode-1"  # both have 3 of its blocks, and this is empty
    assert router.choose(beginning(5, 24, 25)) == "decode-1"  # 6 of its blocks, and 2 less are free
    assert router.choose(beginning(6, 24, 25, adapter=Adapter("other", lora=1))) == "decode-0"


def test_a_router_remembers_as_many_blocks_as_a_worker_has() -> None:
    router = Router({"decode-0": 4, "decode-1": 4}, block_tokens=4, shares=lambda _: True)
    for number in range(3):  # 2 blocks each
        assert router.choose(beginning(number, 0, 8)) == "decode-0"
        router.release(number)
    assert router.choose(beginning(3, 0, 1)) == "decode-0"
    for number, worker in ((0, "decode-1"), (2, "decode-0")):  # the first is forgotten
        assert router.choose(beginning(number, 0, 8)) == worker


def test_the_beginnings_of_what_shares_nothing_do_not_count() -> None:
    router = Router({"decode-0": 40, "decode-1": 42}, block_tokens=4)
    assert router.choose(beginning(0, 12, 13)) == "decode-1"
    assert router.choose(beginning(1, 12, 13)) == "decode-0"


def test_a_policy_that_splits_a_source_is_named() -> None:
    class Splits(FirstCome):
        def pack(self, prompts: Sequence[PendingPrompt], budget: int, now_ns: int) -> list[tuple[PendingPrompt, int]]:
            return [(prompts[0], 1)]

    class Unused:
        def now_ns(self) -> int:
            return 0

        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"{name} is not reached")

    prefiller = Prefiller("prefill-0", Unused(), 8, Splits())  # type: ignore[arg-type]
    prefiller.add(pending(3, encoded=True)[0].task)
    with pytest.raises(RunError, match="prefill-0: the policy splits a prompt that an encoder has to read as a whole"):
        prefiller.take(8)


class LastCome(FirstCome):
    """The latest first, one prompt a step."""

    def admission_order(self, waiting: Collection[WaitingRequest], now_ns: int) -> Iterable[WaitingRequest]:
        return reversed(list(waiting))

    def pack(self, prompts: Sequence[PendingPrompt], budget: int, now_ns: int) -> list[tuple[PendingPrompt, int]]:
        latest = max(prompts, key=lambda prompt: prompt.request.request_id)
        return super().pack([latest], budget, now_ns)


@pytest.mark.parametrize(("policy", "order"), [(FirstCome(), [0, 1, 2, 3]), (LastCome(), [3, 2, 1, 0])])
@pytest.mark.parametrize("blocks", [64, 8], ids=["room for all", "room for one"])
@pytest.mark.parametrize("layout", ["[{role: mixed}]", "[{role: prefill}, {role: decode}]"])
def test_workers_keep_to_any_order(
    layout: str, blocks: int, policy: Policy, order: list[int], tiny: Callable[[str], Path]
) -> None:
    model = load_model(tiny("llama"), dtype="float32", device="cpu", load_format="auto")
    pool = KVPool(attach_engine(model), blocks, BLOCK, model.dtype, model.device)
    wire, specs = Wire(), parse_layout(layout).workers
    workers = [
        build_worker(
            specs,
            number,
            wire.end(spec.name),
            ModelStepper(model, pool),
            range(blocks),
            SchedulerSettings(64, 8, BLOCK, policy),
        )
        for number, spec in enumerate(specs)
    ]
    for number, prompt in enumerate(prompts_of([25, 26, 27, 25])):
        request = Request(number, tuple(prompt), SamplingParams(max_tokens=3, ignore_eos=True), seed=0)
        wire.boxes[specs[-1].name].append(Submit(request, 0))
    run(*workers)
    reports = [message for message in wire.boxes[PARENT] if isinstance(message, Progress)]
    assert [handoff.request_id for report in reports for handoff in report.handoffs] == order
    assert sum(len(report.finished) for report in reports) == 4


@pytest.mark.parametrize("name", POLICIES)
def test_each_policy_of_the_table_is_found(name: str) -> None:
    assert find_policy(name).pack(pending(3), 8, now_ns=0)


def test_a_class_of_ones_own_is_found_by_its_module() -> None:
    assert isinstance(find_policy(f"{__name__}:LastCome"), LastCome)


@dataclass
class Tuned(LastCome):
    """A policy of the user's own, with parameters."""

    weight: int = 1
    share: float = 0.5


def test_parameters_are_set_and_the_others_keep_their_defaults() -> None:
    assert find_policy("deadline:ttft_target_ms=250,ageing_s=inf") == Deadline(math.inf, 250)
    assert find_policy("priority: ageing_s=5") == Priority(5)
    assert find_policy(f"{__name__}:Tuned:weight=3") == Tuned(3, 0.5)


def test_another_engines_name_is_spelt_as_ours() -> None:
    assert policy_name("fcfs") == "first_come"
    assert isinstance(find_policy("fcfs"), FirstCome)


def test_a_record_has_all_parameters() -> None:
    assert describe_policy("priority:ageing_s=5") == {"class": "splitwiser.engine.ranked:Priority", "ageing_s": 5}
    assert describe_policy("first_come") == {"class": "splitwiser.engine.policy:FirstCome"}


def test_what_a_policy_reads_of_requests_is_known() -> None:
    assert reads("priority:ageing_s=5", "priority")
    assert reads(f"{__name__}:Tuned", "priority")  # it may
    assert not reads("fcfs", "priority")
    assert not reads("priority", "ttft_target_ms")
    assert reads("shortest_remaining", "predicted_tokens")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("last_come", "unknown policy 'last_come'; did you mean first_come? known: first_come, shortest_prompt, "),
        ("nowhere:Policy", "policy nowhere:Policy: ModuleNotFoundError: No module named 'nowhere'"),
        ("json:Policy", "policy json:Policy: AttributeError: module 'json' has no attribute 'Policy'"),
        ("collections:OrderedDict", "policy collections:OrderedDict: has no method admission_order"),
        ("priority:5", "policy priority:5: parameters are given as priority:PARAMETER=VALUE"),
        ("priority:", "policy priority:: parameters are given as priority:PARAMETER=VALUE"),
        ("priority:agein_s=5", "policy priority:agein_s=5: unknown parameter 'agein_s'; did you mean ageing_s?"),
        ("priority:ageing_s=soon", "policy priority:ageing_s=soon: 'ageing_s' must be 0 or more seconds, not 'soon'"),
        ("priority:ageing_s=-1", "'ageing_s' must be 0 or more seconds, not '-1'"),
        ("priority:ageing_s=nan", "'ageing_s' must be 0 or more seconds, not 'nan'"),
        ("priority:ageing_s=1,ageing_s=2", "'ageing_s=2' must be PARAMETER=VALUE, each parameter once"),
        ("priority:ageing_s=1,", "'' must be PARAMETER=VALUE, each parameter once"),
        ("deadline:ttft_target_ms=0", "'ttft_target_ms' must be more than 0 milliseconds, not '0'"),
        ("fcfs:ageing_s=5", "policy fcfs:ageing_s=5: FirstCome has no parameters"),
        (
            f"{__name__}:Tuned:weight=x",
            "'weight' must be a valid integer, unable to parse string as an integer, not 'x'",
        ),
    ],
)
def test_what_is_no_policy_is_refused(name: str, words: str) -> None:
    assert words in refusal(find_policy, name)
