"""Rotary scaling that depends on a request's length: each request is rotated as transformers' generate rotates it alone."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoConfig

from splitwiser import LLM, SamplingParams
from splitwiser.model.attention import serving
from splitwiser.model.kernels.interface import LayerShape
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import load_model, max_positions
from splitwiser.model.paged_attention import PagedAttention, Segment
from splitwiser.model.rotary import LengthRotary, length_computed_anew
from splitwiser.model.tiny import save_tiny, tiny_config
from tests.support.tokens import prompts_of

ORIGINAL = 64
NEW_TOKENS = 8
LENGTHS = [3, 60, 64, 65, 90]  # below, across and beyond the original length
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * number for number in range(8)],
}  # fmt: skip
MSCALES = {"short_mscale": 1.1, "long_mscale": 1.3}
BY_LAYER_TYPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": LONGROPE}
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "longrope": ("llama", {"rope_parameters": LONGROPE}),
    "longrope of one type of layer": ("gemma3_text", {"rope_parameters": BY_LAYER_TYPE}),
    "longrope, computed anew": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL}),
    "longrope with scales": (
        "phimoe",
        {"rope_parameters": {**LONGROPE, **MSCALES}, "original_max_position_embeddings": ORIGINAL},
    ),
}


def make(name: str, directory: Path) -> Path:
    architecture, changes = SCALED[name]
    return save_tiny(tiny_config(architecture, **changes), directory)


def tokens(directory: Path, prompts: Sequence[list[int]], **settings: Any) -> list[list[int]]:
    with LLM(directory, **settings) as llm:
        return [output.token_ids for output in llm.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS))]


NEW = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.24"),
    reason="before transformers 5.24, generate forgets the prompt of these models, or fails",
)
ONLY_NEW = ("longrope of one type of layer", "longrope, computed anew", "longrope with scales")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[NEW] * (name in ONLY_NEW)) for name in SCALED])
def test_requests_of_all_lengths_in_one_step_are_rotated_as_each_alone(name: str, tmp_path: Path) -> None:
    directory, prompts = make(name, tmp_path), prompts_of(LENGTHS)
    alone = tokens(directory, prompts, mode="generate", batch_size=1)
    assert tokens(directory, prompts) == alone
    assert tokens(directory, prompts, prefill_tokens=24) == alone  # splits most prompts
    assert tokens(directory, prompts, prefill_tokens=24, schedule="hybrid") == alone


@pytest.mark.parametrize("name", [pytest.param(name, marks=[NEW] * (name in ONLY_NEW)) for name in SCALED])
@pytest.mark.usefixtures("preempt_at_random")
def test_preempted_requests_and_those_that_begin_alike(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path)
    beginning = prompts_of([90])[0]
    prompts = [beginning[:length] for length in (40, 40, 50, 60, 63, 64, 90)]  # across the original length of 64
    alone = tokens(model, prompts, mode="generate", batch_size=1)
    with LLM(model, prefix_caching=True, prefill_tokens=24) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS))
    assert [output.token_ids for output in outputs] == alone
    assert any(output.metrics.preemptions for output in outputs)
    cached = [output.metrics.cached_tokens for output in outputs]
    assert cached == [0, 32, 32, 0, 0, 0, 0]  # only those that stay below it share


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_mode_generate_does_not_let_requests_change_each_other(name: str, tmp_path: Path) -> None:
    directory, prompts = make(name, tmp_path), prompts_of([90, 66])  # the long one first
    alone = [tokens(directory, [prompt], mode="generate")[0] for prompt in prompts]  # a new model for each
    assert tokens(directory, prompts, mode="generate") == alone


def test_workers_keep_no_frequencies_in_the_memory_that_they_share(tmp_path: Path) -> None:
    own = load_model(
        make("longrope", tmp_path), dtype="float32", device="cpu", load_format="auto"
    ).module.model.rotary_emb
    assert isinstance(own, torch.nn.Module)
    rotary = LengthRotary(own)
    before = {name: buffer.clone() for name, buffer in own.named_buffers()}
    pool = KVPool([LayerShape(1, 1, 1)], 8, 16, torch.float32, torch.device("cpu"))
    with serving(PagedAttention(pool, [Segment(range(8), 100, 100)], torch.device("cpu"))):
        rotary(torch.ones(1), torch.arange(100)[None])
    assert all(torch.equal(buffer, before[name]) for name, buffer in own.named_buffers())


def test_positions_reach_as_far_as_the_scaling() -> None:
    assert max_positions(tiny_config("llama", **SCALED["dynamic"][1])) == 4 * ORIGINAL
    assert max_positions(tiny_config("llama", **SCALED["longrope"][1])) == 256
    assert max_positions(AutoConfig.for_model("mamba")) is None


@NEW
def test_only_models_that_generate_so_are_computed_anew() -> None:
    anew = {name: length_computed_anew(tiny_config(*given[:1], **given[1])) for name, given in SCALED.items()}
    assert [name for name, length in anew.items() if length == ORIGINAL + 1] == [
        "longrope, computed anew",
        "longrope with scales",
    ]
