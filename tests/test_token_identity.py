"""Tokens are those of ``model.generate`` on one prompt alone, unpadded: in every mode, whatever else is in the batch."""

import random
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import VOCABULARY
from transformers import AutoModelForCausalLM, PreTrainedModel

from splitwiser import LLM, SamplingParams
from splitwiser.model.compatibility import attach_engine
from splitwiser.model.kv_pool import block_nbytes
from splitwiser.model.loading import load_model
from splitwiser.placement import mps_daemon as mps
from splitwiser.placement.modes import MODES

SERVED = ["opt", "llama", "gpt2", "qwen3", "mistral", "gemma2", "gpt_oss"]
NO_MPS = pytest.mark.skipif(shutil.which(mps.CONTROL) is None, reason=f"{mps.CONTROL} is not on PATH")
ON_A_GPU = {"mps": [pytest.mark.gpu, NO_MPS], "green": [pytest.mark.gpu]}
PLACED = [pytest.param(mode, marks=ON_A_GPU.get(mode, [])) for mode in MODES]
LENGTHS = [1, 5, 40, 100, 17, 2, 63, 16, 1]


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


@cache
def reference_model(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model


def references(directory: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    generate = cast("Callable[..., torch.Tensor]", reference_model(directory).generate)
    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
        made.append(tokens[0, len(prompt) :].tolist())
    return made


def room_for(directory: Path, tokens: int) -> str:
    """A ``kv_memory`` with room for ``tokens`` tokens."""
    model = load_model(directory, dtype="float32", device="cpu", load_format="auto")
    return f"{block_nbytes(attach_engine(model), 16, model.dtype) * (tokens // 16)}B"


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("name", SERVED)
def test_split_prompts_and_waiting_requests(name: str, kernels: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS)
    # a budget below most prompts splits them; room for little more than the longest makes the others wait
    with LLM(tiny(name), prefill_tokens=24, kv_memory=room_for(tiny(name), 144), kernels=kernels) as llm:
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


def test_sampled_tokens_depend_on_the_seed_and_nothing_else(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS, seed=3)
    params = [
        SamplingParams(max_tokens=20, temperature=0.9, top_k=number % 3 * 20, top_p=1 - 0.1 * (number % 2), seed=number)
        for number in range(len(prompts))
    ]
    drawn = []
    placements: list[tuple[str, dict[str, Any]]] = [
        ("sequential", {}),
        ("sequential", {"max_batch": 2, "prefill_tokens": 20}),
        ("generate", {}),
    ]
    for mode, settings in placements:
        with LLM(tiny("llama"), mode=mode, **settings) as llm:
            drawn.append([output.token_ids for output in llm.generate(prompts, params)])
    assert drawn[0] == drawn[1] == drawn[2]
    with LLM(tiny("llama")) as llm:
        (alone,) = llm.generate([prompts[4]], params[4])
        (other,) = llm.generate([prompts[4]], SamplingParams(max_tokens=20, temperature=0.9, seed=1000))
    assert alone.token_ids == drawn[0][4]
    assert other.token_ids != drawn[0][4]


def test_greedy_and_sampled_requests_in_one_batch(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([9, 20, 31])
    params = [SamplingParams(max_tokens=15, temperature=heat) for heat in (0.0, 1.5, 0.0)]
    with LLM(tiny("gpt2")) as llm:
        outputs = llm.generate(prompts, params)
    greedy = references(tiny("gpt2"), prompts, 15)
    assert [outputs[0].token_ids, outputs[2].token_ids] == [greedy[0], greedy[2]]
    assert outputs[1].token_ids != greedy[1]
