"""Preempted requests and requests that share blocks get the tokens of ``model.generate`` on their prompts alone."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from splitwiser import LLM, SamplingParams
from splitwiser.engine.policy import POLICIES
from splitwiser.request import RequestOutput
from tests.support.observers import Canceller
from tests.support.tokens import LENGTHS, SERVED, prompts_of, references, room_for

SPLIT = {"prefill": "[{role: prefill, count: 2}, {role: decode, count: 2}]", "mixed": "[{role: mixed, count: 2}]"}


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def alike(count: int, seed: int) -> list[list[int]]:
    """Prompts that begin with random lengths of two common beginnings."""
    rng = random.Random(seed)
    common = prompts_of([100, 70], seed=seed)
    ends = prompts_of([rng.randint(1, 25) for _ in range(count)], seed=seed + 1)
    whole = [common[1][:32], common[1][:32]]  # a prompt that another one begins with, and that fills its blocks
    return [*([*rng.choice(common)[: rng.randint(1, 100)], *end] for end in ends), *whole]


@pytest.mark.parametrize(("name", "caching"), [*((name, True) for name in SERVED), ("llama", False), ("gemma2", False)])
@pytest.mark.usefixtures("preempt_at_random")
def test_requests_preempted_at_random(name: str, caching: bool, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS)
    with LLM(tiny(name), prefill_tokens=24, prefix_caching=caching) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24))
    assert tokens_of(outputs) == references(tiny(name), prompts, 24)
    assert sum(output.metrics.preemptions for output in outputs) > 9
    for output in outputs:
        times = [output.metrics.arrival_ns, output.metrics.prefill_start_ns, *output.metrics.token_ns]
        assert times == sorted(times)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.usefixtures("preempt_at_random")
def test_preempted_and_shared_in_hybrid_steps(name: str, tiny: Callable[[str], Path]) -> None:
    prompts = alike(8, seed=2)
    with LLM(tiny(name), schedule="hybrid", prefill_tokens=13, prefix_caching=True) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24))
    assert tokens_of(outputs) == references(tiny(name), prompts, 24)
    assert any(output.metrics.cached_tokens for output in outputs)
    assert any(output.metrics.preemptions for output in outputs)


@pytest.mark.usefixtures("preempt_at_random")
def test_sampled_and_penalised_tokens_stay_the_same(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(LENGTHS, seed=3)
    params = [
        SamplingParams(max_tokens=20, temperature=0.9, presence_penalty=1, min_tokens=number, seed=number)
        for number in range(len(prompts))
    ]
    with LLM(tiny("llama")) as llm:
        disturbed = llm.generate(prompts, params)
    monkeypatch.undo()
    with LLM(tiny("llama"), reserve=True) as llm:
        undisturbed = llm.generate(prompts, params)
    assert tokens_of(disturbed) == tokens_of(undisturbed)
    assert any(output.metrics.preemptions for output in disturbed)
    assert not any(output.metrics.preemptions for output in undisturbed)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [*((name, "auto") for name in [*SERVED, "deepseek_v3", "falcon_rw"]), ("gemma2", "plain"), ("gpt_oss", "plain")],
)
def test_prompts_that_begin_alike(name: str, kernels: str, tiny: Callable[[str], Path]) -> None:
    prompts = alike(10, seed=sum(name.encode()))
    # a budget that splits prompts, and room for few of them, so that blocks are overwritten
    with LLM(
        tiny(name), prefill_tokens=40, kv_memory=room_for(tiny(name), 192), kernels=kernels, prefix_caching=True
    ) as llm:
        for new_tokens in (24, 10):
            outputs = llm.generate(prompts, SamplingParams(max_tokens=new_tokens))
            assert tokens_of(outputs) == references(tiny(name), prompts, new_tokens)
    assert any(output.metrics.cached_tokens for output in outputs)


def test_requests_that_come_together_compute_their_beginning_once(tiny: Callable[[str], Path]) -> None:
    common, *ends = prompts_of([64, 3, 4, 5, 6])
    prompts = [[*common, *end] for end in ends]
    with LLM(tiny("llama"), prefix_caching=True) as llm:
        first, second = (llm.generate(prompts, SamplingParams(max_tokens=9)) for _ in range(2))
    assert [output.metrics.cached_tokens for output in first] == [0, 64, 64, 64]
    assert [output.metrics.cached_tokens for output in second] == [64] * 4
    assert tokens_of(first) == tokens_of(second) == references(tiny("llama"), prompts, 9)


def test_a_conversation_goes_on_with_the_blocks_of_its_last_answer(tiny: Callable[[str], Path]) -> None:
    (prompt,) = prompts_of([20])
    with LLM(tiny("llama"), prefix_caching=True) as llm:
        (first,) = llm.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True))
        longer = [*prompt, *first.token_ids, 5, 6]
        (second,) = llm.generate([longer], SamplingParams(max_tokens=9))
    assert second.metrics.cached_tokens == 48  # of 20 + 30 - 1 whose K and V were stored
    assert tokens_of([second]) == references(tiny("llama"), [longer], 9)


def test_samples_of_a_prompt_share_it_without_prefix_caching(tiny: Callable[[str], Path]) -> None:
    (prompt,) = prompts_of([40])
    params = SamplingParams(n=3, temperature=1, max_tokens=9, seed=4)
    with LLM(tiny("llama")) as llm:
        (first,), (second,) = llm.generate([prompt], params), llm.generate([prompt], params)
        alone = llm.generate([prompt], SamplingParams(temperature=1, max_tokens=9, seed=4))
    for output in (first, second):  # nothing is kept for the second call
        assert [each.metrics.cached_tokens for each in (output, *output.others)] == [0, 32, 32]
    assert first.token_ids == alone[0].token_ids
    assert [each.token_ids for each in first.others] == [each.token_ids for each in second.others]


@pytest.mark.usefixtures("preempt_at_random")
def test_log_probabilities_are_whole_though_a_prompt_was_found_or_preempted(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([40]) * 3
    params = SamplingParams(max_tokens=20, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    with LLM(tiny("llama"), prefix_caching=True) as llm:
        llm.generate(prompts, SamplingParams(max_tokens=20))
        outputs = llm.generate(prompts, params)
    assert [output.metrics.cached_tokens for output in outputs] == [0] * 3
    assert any(output.metrics.preemptions for output in outputs)
    assert [(len(output.prompt_logprobs or ()), len(output.logprobs or ())) for output in outputs] == [(40, 20)] * 3


def test_nothing_is_kept_without_prefix_caching(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([64]) * 2
    with LLM(tiny("llama")) as llm:
        outputs = [output for _ in range(2) for output in llm.generate(prompts, SamplingParams(max_tokens=2))]
    assert [output.metrics.cached_tokens for output in outputs] == [0] * 4


def test_an_encoder_decoder_reserves_and_shares_nothing(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([40]) * 3
    with LLM(tiny("t5"), prefix_caching=True, kv_memory=room_for(tiny("t5"), 144)) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24))
        assert "prefix caching is for decoders" in " ".join(llm.model.notes)
    assert tokens_of(outputs) == references(tiny("t5"), prompts, 24)
    assert {(output.metrics.cached_tokens, output.metrics.preemptions) for output in outputs} == {(0, 0)}


@pytest.mark.parametrize(
    ("name", "layout", "options"),
    [
        ("mistral", "prefill", {"policy": "shortest_prompt"}),
        pytest.param("gemma2", "prefill", {"policy": "deadline"}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "mixed", {"policy": "shortest_remaining"}, marks=pytest.mark.slow),
        ("gpt_oss", "mixed", {"schedule": "hybrid"}),
        pytest.param("gemma2", "mixed", {"schedule": "hybrid", "policy": "shortest_prompt"}, marks=pytest.mark.slow),
    ],
)
def test_workers_in_processes(name: str, layout: str, options: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    """Workers that preempt for want of room, find common beginnings, and have some of their requests cancelled."""
    prompts = alike(14, seed=1)
    options = {**options, "workers": SPLIT[layout], "prefill_tokens": 40, "prefix_caching": True}
    with LLM(tiny(name), mode="mp", kv_memory=room_for(tiny(name), 2 * 208), **options) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=60, ignore_eos=True))
        assert any(output.metrics.preemptions for output in outputs)
        for cancels in (False, True):
            seen = Canceller(llm, len(prompts), seed=0) if cancels else None
            outputs = llm.generate(prompts, SamplingParams(max_tokens=30), observer=seen)
            for output, tokens in zip(outputs, references(tiny(name), prompts, 30), strict=True):
                made = len(output.token_ids) if output.finish_reason == "cancelled" else len(tokens)
                assert output.token_ids == tokens[:made]
    assert any(output.metrics.cached_tokens for output in outputs)
    assert any(output.finish_reason == "cancelled" for output in outputs)


def test_a_later_call_finds_its_beginning_with_the_worker_that_has_it(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([40, 50])
    with LLM(tiny("llama"), mode="mp", workers=SPLIT["mixed"], prefix_caching=True) as llm:
        llm.generate(prompts, SamplingParams(max_tokens=9))
        longer = [[*prompt, 7] for prompt in reversed(prompts)]  # by the load alone, each would go to the other worker
        outputs = llm.generate(longer, SamplingParams(max_tokens=9))
    assert [output.metrics.cached_tokens for output in outputs] == [48, 32]
    assert tokens_of(outputs) == references(tiny("llama"), longer, 9)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "first_come"])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.usefixtures("preempt_at_random")
def test_preempted_shared_and_cancelled_under_every_policy(name: str, policy: str, tiny: Callable[[str], Path]) -> None:
    prompts = alike(8, seed=2)
    with LLM(tiny(name), policy=policy, schedule="hybrid", prefill_tokens=13, prefix_caching=True) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24), observer=Canceller(llm, len(prompts), seed=1))
    for output, tokens in zip(outputs, references(tiny(name), prompts, 24), strict=True):
        made = len(output.token_ids) if output.finish_reason == "cancelled" else len(tokens)
        assert output.token_ids == tokens[:made]
    assert any(output.metrics.preemptions for output in outputs)
