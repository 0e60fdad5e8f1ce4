"""Runs over KV pools in another number format than the model's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from splitwiser import LLM, SamplingParams
from splitwiser.cli import main
from splitwiser.request import RequestOutput
from tests.support.tokens import LENGTHS, prompts_of

Tiny = Callable[[str], Path]


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def generate(
    model: Path, prompts: Sequence[Sequence[int]], max_tokens: int = 20, **options: Any
) -> list[RequestOutput]:
    with LLM(model, **options) as llm:
        return llm.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("opt", "bfloat16"), ("llama", "bfloat16"), ("llama", "float32"), ("t5", "float32")]
)
def test_modes_read_the_same_pool(tiny: Tiny, kind: str, dtype: str, kv_dtype: str) -> None:
    made = [
        generate(tiny(kind), prompts_of(LENGTHS), mode=mode, dtype=dtype, kv_dtype=kv_dtype)
        for mode in ("sequential", "mp")
    ]
    assert tokens_of(made[0]) == tokens_of(made[1])


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_the_models_own_format_changes_nothing(tiny: Tiny, kind: str) -> None:
    made = [
        generate(tiny(kind), prompts_of(LENGTHS), dtype="bfloat16", kv_dtype=kv_dtype) for kv_dtype in ("auto", "bf16")
    ]
    assert tokens_of(made[0]) == tokens_of(made[1])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "deepseek_v3"])
def test_compiled_kernels_make_the_tokens_of_plain_pytorch(tiny: Tiny, kind: str) -> None:
    made = [
        tokens_of(generate(tiny(kind), prompts_of(LENGTHS), 3, kv_dtype="int8", kernels=kernels))
        for kernels in ("auto", "plain")
    ]
    same = [one == other for each in zip(*made, strict=True) for one, other in zip(*each, strict=True)]
    assert sum(same) > 0.9 * len(same)  # not all: queries are rounded to bfloat16


@pytest.mark.usefixtures("preempt_at_random")
def test_preempted_requests_and_shared_blocks(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    common = prompts_of([100])[0]
    prompts = [[*common[: 10 * number], *end] for number, end in enumerate(prompts_of([5] * 8, seed=1))]
    options: dict[str, Any] = {"kv_dtype": "int8", "kernels": "plain"}
    disturbed = generate(tiny("llama"), prompts, prefill_tokens=24, prefix_caching=True, **options)
    monkeypatch.undo()
    undisturbed = generate(tiny("llama"), prompts, reserve=True, **options)
    assert tokens_of(disturbed) == tokens_of(undisturbed)
    assert any(output.metrics.preemptions for output in disturbed)
    assert any(output.metrics.cached_tokens for output in disturbed)


def test_as_much_memory_holds_more_tokens(tiny: Tiny) -> None:
    blocks = {}
    for kv_dtype in ("auto", "bfloat16", "int8"):
        with LLM(tiny("llama"), kv_memory="1MiB", kv_dtype=kv_dtype) as llm:
            assert llm.started.pool is not None
            blocks[kv_dtype] = llm.started.pool.blocks
            said = llm.started.kernels.get("kv_pool", "")
            assert ("logits change by" in said) == (kv_dtype != "auto")
    size = 2 * 2 * 12 * 3 * 16  # K and V of 2 heads of 12, 3 layers, 16 tokens
    assert blocks == {"auto": 2**20 // (4 * size), "bfloat16": 2**20 // (2 * size), "int8": 2**20 // (size * 16 // 12)}


@pytest.mark.slow
@pytest.mark.usefixtures("runs_here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_summaries_of_the_embedded_model_stay_as_good(tmp_path: Path, dtype: str) -> None:
    scores = {}
    for kv_dtype in ("auto", "int8"):
        folder = tmp_path / kv_dtype
        assert main(["run", "--dtype", dtype, "--kv_dtype", kv_dtype, "--results", str(folder)]) == 0
        (table,) = folder.glob("*/throughput.csv")
        row = pd.read_csv(table).iloc[0]
        assert row["kv_dtype"] == kv_dtype
        scores[kv_dtype] = row["rougeL"]
    assert scores["int8"] > scores["auto"] - 0.005
