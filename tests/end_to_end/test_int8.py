"""Runs with int8 weights, on the embedded model and on tiny ones of several structures."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from splitwiser import LLM, SamplingParams
from splitwiser.cli import main
from splitwiser.model.kernels.int8_linear import Int8Linear
from splitwiser.model.kernels.packed_linear import find_packing_problem
from tests.support.tokens import LENGTHS, prompts_of

pytestmark = pytest.mark.skipif(find_packing_problem() is not None, reason=f"cannot pack: {find_packing_problem()}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opt", "llama", "qwen3", "t5"])
def test_modes_share_the_weights_and_make_the_same_tokens(tiny: Callable[[str], Path], kind: str) -> None:
    made = []
    for mode in ("sequential", "mp"):
        with LLM(tiny(kind), mode=mode, dtype="bfloat16", quantization="int8") as llm:
            layers = sum(isinstance(part, Int8Linear) for part in llm.model.module.modules())
            assert f"int8, {layers} layers" in llm.started.kernels["linear_layers"]
            outputs = llm.generate(prompts_of(LENGTHS), SamplingParams(max_tokens=8, ignore_eos=True))
            made.append([output.token_ids for output in outputs])
    assert layers > 4
    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.usefixtures("runs_here")
def test_summaries_of_the_embedded_model_stay_as_good(tmp_path: Path) -> None:
    scores = {}
    for quantization in ("none", "int8"):
        folder = tmp_path / quantization
        arguments = ["run", "--dtype", "bf16", "--quantization", quantization, "--results", str(folder)]
        assert main(arguments) == 0
        (table,) = folder.glob("*/throughput.csv")
        row = pd.read_csv(table).iloc[0]
        assert row["quantization"] == quantization
        scores[quantization] = row["rougeL"]
    assert scores["int8"] > scores["none"] - 0.005
