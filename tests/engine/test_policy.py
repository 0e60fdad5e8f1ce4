"""The decisions of scheduling, and that a worker keeps to a policy's order, whatever it is."""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import pytest

from splitwiser.engine.messages import PrefillTask, Progress, Submit
from splitwiser.engine.policy import (
    FIRST_COME,
    POLICIES,
    FirstCome,
    LeastLoadedRouter,
    PendingPrompt,
    Policy,
    find_policy,
)
from splitwiser.engine.prefill import Prefiller
from splitwiser.engine.steps import ModelStepper, SequenceState
from splitwiser.engine.worker import PARENT, SchedulerSettings, build_worker
from splitwiser.errors import RunError
from splitwiser.model.compatibility import attach_engine
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import load_model
from splitwiser.placement.layout import parse_layout
from splitwiser.request import Request, SamplingParams
from tests.support.assertions import refusal
from tests.support.tokens import prompts_of
from tests.support.workers import BLOCK, Wire, run


def pending(*lengths: int, encoded: bool = False) -> list[PendingPrompt]:
    requests = [
        Request(number, (5,) * length, SamplingParams(max_tokens=2), 0, encoded=encoded)
        for number, length in enumerate(lengths)
    ]
    return [PendingPrompt(PrefillTask(each, (), "decode-0"), SequenceState(each, ())) for each in requests]


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
    made = FIRST_COME.pack(prompts, budget)
    assert [tokens for _, tokens in made] == packed
    assert [prompt for prompt, _ in made] == prompts[: len(packed)]


def test_what_an_encoder_reads_is_not_split() -> None:
    first = FIRST_COME.pack(prompts := pending(30, 4, 5, encoded=True), 8)
    assert [tokens for _, tokens in first] == [30]  # in a step of its own, and nothing else in it
    assert [tokens for _, tokens in FIRST_COME.pack(prompts[1:], 8)] == [4]


def test_what_a_prompt_has_left_counts() -> None:
    prompts = pending(30, 4)
    prompts[0].done = 26
    assert [tokens for _, tokens in FIRST_COME.pack(prompts, 8)] == [4, 4]


def test_a_request_goes_to_the_worker_with_the_most_room() -> None:
    router = LeastLoadedRouter({"decode-0": 10, "decode-1": 9}, block_tokens=4)
    long = Request(0, (5,) * 17, SamplingParams(max_tokens=4), 0)
    assert router.choose(long) == "decode-0"  # 5 blocks
    assert router.choose(Request(1, (5,), SamplingParams(max_tokens=4), 0)) == "decode-1"
    router.release(0)
    assert router.choose(Request(2, (5,), SamplingParams(max_tokens=4), 0)) == "decode-0"


def test_a_policy_that_splits_a_source_is_named() -> None:
    class Splits(FirstCome):
        def pack(self, prompts: Sequence[PendingPrompt], budget: int) -> list[tuple[PendingPrompt, int]]:
            return [(prompts[0], 1)]

    class Unused:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"{name} is not reached")

    prefiller = Prefiller("prefill-0", Unused(), 8, Splits())  # type: ignore[arg-type]
    prefiller.add(pending(3, encoded=True)[0].task)
    with pytest.raises(RunError, match="prefill-0: the policy splits a prompt that an encoder has to read as a whole"):
        prefiller.step()


class LastCome(FirstCome):
    """The latest first, one prompt a step."""

    def admission_order(self, waiting: Collection[Request]) -> Iterable[Request]:
        return reversed(list(waiting))

    def pack(self, prompts: Sequence[PendingPrompt], budget: int) -> list[tuple[PendingPrompt, int]]:
        latest = max(prompts, key=lambda prompt: prompt.task.request.request_id)
        return super().pack([latest], budget)


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
        wire.boxes[specs[-1].name].append(Submit(request))
    run(*workers)
    reports = [message for message in wire.boxes[PARENT] if isinstance(message, Progress)]
    assert [handoff.request_id for report in reports for handoff in report.handoffs] == order
    assert sum(len(report.finished) for report in reports) == 4


@pytest.mark.parametrize("name", POLICIES)
def test_each_policy_of_the_table_is_found(name: str) -> None:
    assert find_policy(name).pack(pending(3), 8)


def test_a_class_of_ones_own_is_found_by_its_module() -> None:
    assert isinstance(find_policy(f"{__name__}:LastCome"), LastCome)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("last_come", "unknown policy 'last_come'; did you mean first_come? known: first_come, MODULE:CLASS"),
        ("nowhere:Policy", "policy nowhere:Policy: ModuleNotFoundError: No module named 'nowhere'"),
        ("json:Policy", "policy json:Policy: AttributeError: module 'json' has no attribute 'Policy'"),
        ("collections:OrderedDict", "policy collections:OrderedDict: has no method admission_order"),
    ],
)
def test_what_is_no_policy_is_refused(name: str, words: str) -> None:
    assert words in refusal(find_policy, name)
