"""Tokens are those of ``model.generate`` on one prompt alone, unpadded: in every mode, whatever else is in the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import LogitsProcessor

from splitwiser import LLM, SamplingParams, constants
from splitwiser.engine.policy import POLICIES
from splitwiser.placement.modes import MODES
from tests.support.tokens import (
    DISPATCHED,
    ENCODER_DECODERS,
    LENGTHS,
    SERVED,
    prompts_of,
    reference_model,
    references,
    room_for,
)

# mode mps, whose workers are those of mp, is tested with its daemon
PLACED = [pytest.param(mode, marks=[pytest.mark.gpu] * (mode == "green")) for mode in MODES if mode != "mps"]


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("name", SERVED)
def test_split_prompts_and_waiting_requests(name: str, kernels: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS)
    # a budget below most prompts splits them; room for little more than the longest makes the others wait
    with LLM(tiny(name), prefill_tokens=24, kv_memory=room_for(tiny(name), 144), kernels=kernels) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24))
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 24)


@pytest.mark.parametrize("name", DISPATCHED)
def test_models_with_attention_modules_of_this_project(name: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS)
    arrivals = [0.01 * (len(prompts) - number) for number in range(len(prompts))]
    with LLM(tiny(name), prefill_tokens=24) as llm:  # splits most prompts
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24), arrival_s=arrivals)
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 24)


def test_biases_that_the_model_rounds_at_late_positions(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([400, 300])
    with LLM(tiny("falcon_rw")) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=40))
    assert [output.token_ids for output in outputs] == references(tiny("falcon_rw"), prompts, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon_rw", "gpt_neo"])
def test_attention_modules_of_this_project_in_processes(name: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS)
    with LLM(tiny(name), mode="mp") as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24))
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 24)


@pytest.mark.parametrize("mode", ["sequential", "mp"])
@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3"])
def test_models_that_store_latents_instead_of_keys_and_values(
    name: str, mode: str, tiny: Callable[[str], Path]
) -> None:
    prompts = prompts_of(LENGTHS)
    with LLM(tiny(name), mode=mode, prefill_tokens=24) as llm:  # splits most prompts
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24))
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 24)


@pytest.mark.parametrize("mode", PLACED)
@pytest.mark.parametrize("name", SERVED)
def test_all_prompts_at_once(mode: str, name: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS, seed=1)
    with LLM(tiny(name), mode=mode) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=40))
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 40)


@pytest.mark.parametrize("new_tokens", [1, 2, 150])
@pytest.mark.parametrize("mode", PLACED)
def test_one_and_many_new_tokens(mode: str, new_tokens: int, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([1, 30, 90])
    with LLM(tiny("llama"), mode=mode) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=new_tokens))
    assert [output.token_ids for output in outputs] == references(tiny("llama"), prompts, new_tokens)


@pytest.mark.parametrize("name", ["opt", "mistral"])
def test_staggered_arrivals_change_no_token(name: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS, seed=2)
    arrivals = [0.02 * (len(prompts) - number) for number in range(len(prompts))]  # the last prompt comes first
    with LLM(tiny(name), prefill_tokens=32) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=30), arrival_s=arrivals)
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 30)


@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        *((policy, "sequential") for policy in POLICIES if policy != constants.POLICY),
        pytest.param("priority", "mp", marks=pytest.mark.slow),
    ],
)
def test_the_order_of_requests_changes_no_token(policy: str, mode: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS)
    own: dict[str, Any] = {"priority": {"priority": range(len(prompts), 0, -1)}}.get(policy, {})
    with LLM(
        tiny("mistral"), mode=mode, policy=policy, prefill_tokens=24, kv_memory=room_for(tiny("mistral"), 144)
    ) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24), **own)
    assert [output.token_ids for output in outputs] == references(tiny("mistral"), prompts, 24)


@pytest.mark.parametrize(
    ("name", "kernels"), [*((name, "auto") for name in ENCODER_DECODERS), ("t5", "plain"), ("bart", "plain")]
)
def test_encoder_decoders(name: str, kernels: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS)
    arrivals = [0.01 * (number % 3) for number in range(len(prompts))]
    # a budget below most sources, and room for little more than the longest, so that blocks are used again
    with LLM(tiny(name), prefill_tokens=24, kv_memory=room_for(tiny(name), 144), kernels=kernels) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24), arrival_s=arrivals)
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("generate", "m2m_100"),
        ("generate", "flan_t5"),
        ("mp", "flan_t5"),
        pytest.param("green", "flan_t5", marks=pytest.mark.gpu),
    ],
)
def test_encoder_decoders_in_other_modes(mode: str, name: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS, seed=1)
    with LLM(tiny(name), mode=mode) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=40))
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 40)


@pytest.mark.parametrize("name", ["llama", "flan_t5"])
def test_sampled_tokens_depend_on_the_seed_and_nothing_else(name: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS, seed=3)
    params = [
        SamplingParams(
            max_tokens=20,
            temperature=0.9,
            top_k=number % 3 * 20,
            top_p=1 - 0.1 * (number % 2),
            min_p=0.01 * number,
            presence_penalty=number % 2,
            seed=number,
        )
        for number in range(len(prompts))
    ]
    drawn = []
    placements: list[tuple[str, dict[str, Any]]] = [
        ("sequential", {}),
        ("sequential", {"max_batch": 2, "prefill_tokens": 20}),
        ("generate", {}),
    ]
    for mode, settings in placements:
        with LLM(tiny(name), mode=mode, **settings) as llm:
            drawn.append([output.token_ids for output in llm.generate(prompts, params)])
    assert drawn[0] == drawn[1] == drawn[2]
    with LLM(tiny(name)) as llm:
        (alone,) = llm.generate([prompts[4]], params[4])
        (other,) = llm.generate([prompts[4]], SamplingParams(max_tokens=20, temperature=0.9, seed=1000))
    assert alone.token_ids == drawn[0][4]
    assert other.token_ids != drawn[0][4]


class WrittenPenalties(LogitsProcessor):
    """Presence and frequency penalties by their definition, which transformers does not have."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self.prompt_tokens, self.presence, self.frequency = prompt_tokens, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self.prompt_tokens :], minlength=scores.shape[-1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


# our names, and transformers' settings of the same meaning; its end-of-sequence token is 2
PENALISED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
    ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
    ({"logit_bias": {9: 6, 2: 4}}, {"sequence_bias": {(9,): 6.0, (2,): 4.0}}),
    ({"stop_token_ids": range(0, 150, 7)}, {"eos_token_id": [2, *range(0, 150, 7)]}),
    ({"stop_token_ids": range(0, 150, 7), "min_tokens": 9}, {"eos_token_id": [2, *range(0, 150, 7)], "min_new_tokens": 9}),
    ({"presence_penalty": 1.5, "frequency_penalty": 0.75}, {"processor": (1.5, 0.75)}),
    (
        {"repetition_penalty": 1.2, "logit_bias": {2: 50}, "min_tokens": 12, "frequency_penalty": 1},
        {"repetition_penalty": 1.2, "sequence_bias": {(2,): 50.0}, "min_new_tokens": 12, "processor": (0.0, 1.0)},
    ),
]  # fmt: skip


def generate_with(directory: Path, prompt: list[int], settings: dict[str, Any]) -> list[int]:
    """The tokens that ``model.generate`` makes of ``prompt`` with its own ``settings``."""
    model, settings = reference_model(directory), dict(settings)
    begin = 1 if model.config.is_encoder_decoder else len(prompt)
    written = settings.pop("processor", None)
    ids = torch.tensor([prompt])
    tokens = cast("Callable[..., torch.Tensor]", model.generate)(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=24,
        logits_processor=[WrittenPenalties(begin, *written)] if written else [],
        **settings,
    )
    made: list[int] = tokens[0, begin:].tolist()
    return made


@pytest.mark.parametrize(
    ("name", "mode"),
    [*(pytest.param("llama", *each.values, marks=each.marks) for each in PLACED), ("bart", "sequential")],
)
def test_penalties_biases_and_ends_are_those_of_generate(name: str, mode: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([40, 17, 17, 5, 9, 9, 30, 12], seed=4)
    theirs = [settings for _, settings in PENALISED]
    expected = [generate_with(tiny(name), *each) for each in zip(prompts, theirs, strict=True)]
    plain = references(tiny(name), prompts, 24)
    same = [made == other for made, other in zip(expected, plain, strict=True)]
    assert same == [True] + [False] * 7 or name != "llama"  # each setting matters
    params = [SamplingParams(max_tokens=24, **ours) for ours, _ in PENALISED]
    with LLM(tiny(name), mode=mode) as llm:
        outputs = llm.generate(prompts, params)
    assert [output.token_ids for output in outputs] == expected


def test_greedy_and_sampled_requests_in_one_batch(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([9, 20, 31])
    params = [SamplingParams(max_tokens=15, temperature=heat) for heat in (0.0, 1.5, 0.0)]
    with LLM(tiny("gpt2")) as llm:
        outputs = llm.generate(prompts, params)
    greedy = references(tiny("gpt2"), prompts, 15)
    assert [outputs[0].token_ids, outputs[2].token_ids] == [greedy[0], greedy[2]]
    assert outputs[1].token_ids != greedy[1]
