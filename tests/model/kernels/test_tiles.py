"""What is computed in AMX tiles, emulated where the processor has none, is what is computed without them."""

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitwiser import LLM, SamplingParams
from splitwiser.model import fused, trials
from splitwiser.model.kernels import cpu_attention, int8_linear, packed_linear
from splitwiser.model.kernels.cpu_attention import CpuAttention, FlashPrefill
from splitwiser.model.kernels.interface import LayerShape
from splitwiser.model.kernels.packed_linear import PANELS, LinearStruct, PackedLinear
from splitwiser.model.kernels.tile_trials import ALL_ROWS, TRIED_ROWS
from tests.model.kernels.test_cpu_attention import OPTIONS, SHAPES, Case, make_case
from tests.model.kernels.test_packed_linear import laid_out, linear
from tests.support.models import make_tiny
from tests.support.tiles import load_with_tiles
from tests.support.tokens import prompts_of

LIBRARY, WHY_NOT = load_with_tiles()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=WHY_NOT)
needs_packing = pytest.mark.skipif(
    packed_linear.find_packing_problem() is not None, reason=f"cannot pack: {packed_linear.find_packing_problem()}"
)


def library() -> ctypes.CDLL:
    assert LIBRARY is not None
    return LIBRARY


def random(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(2)).bfloat16()


# ---- prefill attention


def attend(case: Case, kernel: Callable[..., Tensor]) -> Tensor:
    return kernel(
        case.query, case.keys, case.values, case.tables, case.starts, case.offsets, case.lengths, case.scaling,
        case.softcap, case.sinks, case.bias, case.bias_by_position,
    ).float()  # fmt: skip


def check_prefill(case: Case) -> None:
    made = attend(case, CpuAttention(library(), in_tiles=True))
    torch.testing.assert_close(made, case.written_out(), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_of_any_shape(shape: tuple[int, int, int, int]) -> None:
    check_prefill(make_case(shape, torch.bfloat16, [7, 65], [7, 65]))


@pytest.mark.parametrize("option", OPTIONS)
def test_prefill_with_any_option(option: str) -> None:
    check_prefill(make_case((4, 2, 40, 48), torch.bfloat16, [70, 33], [70, 33], **OPTIONS[option]))


@pytest.mark.parametrize("option", ["causal", "window"])
@pytest.mark.usefixtures("_threads")
def test_prefill_after_a_cached_prefix(option: str) -> None:
    check_prefill(make_case((3, 1, 64, 64), torch.bfloat16, [300, 64, 150], [20, 1, 33], **OPTIONS[option]))


def test_prefill_over_several_steps_of_the_softmax() -> None:
    check_prefill(make_case((2, 2, 32, 32), torch.bfloat16, [290], [290]))


@pytest.mark.parametrize("option", OPTIONS)
def test_flash_attention_takes_whole_prompts_and_leaves_the_rest(option: str) -> None:
    case = make_case((4, 2, 40, 48), torch.bfloat16, [70, 33, 5], [70, 33, 5], **OPTIONS[option])
    made = attend(case, FlashPrefill(CpuAttention(library())))
    torch.testing.assert_close(made, case.written_out(), atol=0.03, rtol=0.03)


def test_flash_attention_leaves_the_rest_of_a_prompt() -> None:
    case = make_case((4, 2, 40, 48), torch.bfloat16, [70, 33], [20, 33])
    made = attend(case, FlashPrefill(CpuAttention(library())))
    torch.testing.assert_close(made, case.written_out(), atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"dots": 5.0, "tiles": 1.0, "flash": 2.0}, "AMX tiles"),
        ({"dots": 1.0, "tiles": 5.0, "flash": 2.0}, "compiled by"),
        ({"dots": 5.0, "tiles": 4.0, "flash": 3.5}, "AMX tiles"),
        ({"dots": 5.0, "tiles": 5.0, "flash": 2.0}, "flash"),
    ],
)
def test_the_fastest_prefill_serves_and_the_record_says_so(
    seconds: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "TRIED_TOKENS", 40)
    monkeypatch.setattr(cpu_attention, "best_seconds", lambda calls: {name: seconds[name] for name in calls})
    monkeypatch.setattr(cpu_attention, "remembered_trial", lambda _library, _name, find: find())
    _, described = cpu_attention._choose_prefill(library(), LayerShape(2, 32, 32), "attention.cpp, compiled by g++")
    assert chosen in described.partition(" (ms for 40 tokens: dots ")[0]


def test_tiles_that_compute_something_else_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: CpuAttention, query: Tensor, *_: object) -> Tensor:
        return query + 1 if self._in_tiles else query

    monkeypatch.setattr(CpuAttention, "__call__", wrong)
    monkeypatch.setattr(cpu_attention, "TRIED_TOKENS", 40)
    monkeypatch.setattr(cpu_attention, "best_seconds", lambda calls: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(cpu_attention, "remembered_trial", lambda _library, _name, find: find())
    kernel, described = cpu_attention._choose_prefill(library(), LayerShape(2, 32, 32), "attention.cpp")
    assert isinstance(kernel, CpuAttention)
    assert "tiles" not in described


# ---- products


def product(struct: LinearStruct, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
    """What csrc/layer.cpp makes of ``inputs``."""
    output = inputs.new_empty(len(inputs), struct.outputs)
    library().multiply_small_batch(
        ctypes.byref(struct), inputs.data_ptr(), None if residual is None else residual.data_ptr(), output.data_ptr(),
        len(inputs), torch.get_num_threads(),
    )  # fmt: skip
    return output


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("rows", [1, 16, 17, 70])
@pytest.mark.parametrize("sizes", [(64, 128), (96, 100), (32, 1), (40, 65)], ids=str)
@pytest.mark.parametrize("panel", PANELS)
def test_products_in_any_layout(panel: int, sizes: tuple[int, int], rows: int) -> None:
    plain, inputs, residual = linear(True, *sizes), random(rows, sizes[0]), random(rows, sizes[1])
    filled = -(-sizes[0] // 32) * 32
    packed = laid_out(plain.weight, panel, filled)
    made = []
    for dot_rows in (0, ALL_ROWS):
        struct = LinearStruct(
            packed.data_ptr(), plain.bias.data_ptr(), None, None, sizes[0], sizes[1], False, panel, filled, dot_rows
        )
        made.append(product(struct, inputs, residual))
    torch.testing.assert_close(made[0], made[1], atol=0.02, rtol=0.02)
    with torch.inference_mode():
        torch.testing.assert_close(made[0], plain(inputs) + residual, atol=0.03, rtol=0.03)


@needs_packing
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("sizes", [(64, 128), (577, 130), (40, 100), (3, 65)], ids=str)
def test_int8_products_are_the_same_to_the_last_bit(sizes: tuple[int, int], rows: int) -> None:
    layer, inputs = int8_linear.Int8Linear(PackedLinear(linear(True, *sizes))), random(rows, sizes[0])
    if int8_linear._functions() is None:
        pytest.skip("this processor has no products of int8 quads")
    made = []
    for dot_rows in (0, ALL_ROWS):
        struct = layer._make_struct(relu=False, dot_rows=dot_rows)
        made.append(inputs.new_empty(rows, sizes[1]))
        int8_linear._call(library(), struct, inputs, None, made[-1])
    assert torch.equal(*made)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], dict[str, float]]], None]:
    """Lets trials of products see given times, by rows, of small layers."""

    def prepare(times: Callable[[int], dict[str, float]]) -> None:
        for module in (packed_linear, int8_linear):
            counts = iter(TRIED_ROWS)

            def taken(candidates: dict[str, Any], counts: Iterator[int] = counts) -> dict[str, float]:
                for run in candidates.values():
                    run()
                return times(next(counts))

            monkeypatch.setattr(module, "best_seconds", taken)
            monkeypatch.setattr(module, "TRIED_ROWS", (1, 2, 4, 8))
        monkeypatch.setattr(packed_linear, "TRIED_SIZES", (64, 64))
        monkeypatch.setattr(packed_linear, "TRIED_BYTES", 2 * 64 * 64 * 2)
        monkeypatch.setattr(packed_linear, "_small_batch_functions", lambda: LIBRARY)
        monkeypatch.setattr(packed_linear, "_PANELS", {})
        monkeypatch.setattr(packed_linear, "_row_limits", cache(packed_linear._row_limits.__wrapped__))
        monkeypatch.setattr(packed_linear, "remembered_trial", lambda _library, _name, find: find())

    return prepare


@needs_packing
def test_dot_products_tiles_and_onednn_have_the_numbers_of_rows_at_which_they_are_fastest(
    tried: Callable[[Callable[[int], dict[str, float]]], None],
) -> None:
    tried(lambda rows: {"dots": rows, "tiles": 3, "onednn": 2 if rows < 8 else 1})
    layer = PackedLinear(linear(True, 64, 64))
    if layer._find_struct() is None:
        pytest.skip("oneDNN uses another weight layout here")
    assert packed_linear._row_limits() == (2, 2)
    assert layer.struct
    assert layer.struct.dot_rows == 2
    tried(lambda rows: {"dots": rows, "tiles": 3, "onednn": 3 if rows < 8 else 1})
    assert packed_linear._row_limits() == (2, 4)
    tried(lambda rows: {"dots": 1, "tiles": 3, "onednn": 2 if rows < 8 else 0.5})
    assert packed_linear._row_limits() == (ALL_ROWS, 4)


@needs_packing
def test_products_in_tiles_that_give_something_else_do_not_serve(
    tried: Callable[[Callable[[int], dict[str, float]]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried(lambda rows: {"dots": rows, "onednn": 2})
    own = PackedLinear._multiply_small_batch

    def wrong(layer: PackedLinear, struct: LinearStruct, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        made: Tensor = own(layer, struct, inputs, residual) + (struct.dot_rows == 0)
        return made

    monkeypatch.setattr(PackedLinear, "_multiply_small_batch", wrong)
    if PackedLinear(linear(True, 64, 64))._find_struct() is None:
        pytest.skip("oneDNN uses another weight layout here")
    assert packed_linear._row_limits() == (ALL_ROWS, 2)


@needs_packing
def test_int8_products_go_to_tiles_from_the_number_of_rows_at_which_these_are_faster(
    tried: Callable[[Callable[[int], dict[str, float]]], None],
) -> None:
    tried(lambda rows: {"dots": rows, "tiles": 3})
    assert int8_linear._try_rows(library()) == 2
    tried(lambda rows: {"dots": rows, "tiles": 100})
    assert int8_linear._try_rows(library()) == ALL_ROWS


# ---- a model


@pytest.fixture
def _all_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that can be computed in tiles is."""
    for module in (cpu_attention, trials):
        monkeypatch.setattr(module, "load_native", load_with_tiles)
    for module, name in ((fused, "_functions"), (int8_linear, "_functions"), (packed_linear, "_small_batch_functions")):
        monkeypatch.setattr(module, name, lambda: LIBRARY)
    monkeypatch.setattr(packed_linear, "_row_limits", lambda: (0, 128))
    monkeypatch.setattr(int8_linear, "_dot_rows", lambda: 0)
    monkeypatch.setattr(
        cpu_attention, "_choose_prefill", lambda library, *_: (CpuAttention(library, in_tiles=True), "in AMX tiles")
    )


def generate(model: Path, quantization: str) -> tuple[dict[str, str], list[list[int]]]:
    """The record of the kernels that serve ``model``, and tokens of prompts of a few lengths."""
    with LLM(model, dtype="bfloat16", quantization=quantization) as llm:
        outputs = llm.generate(prompts_of([3, 40, 9], seed=3), SamplingParams(max_tokens=6, ignore_eos=True))
        return llm.started.kernels, [output.token_ids for output in outputs]


WIDE_ENOUGH: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("name", WIDE_ENOUGH)
def test_a_model_in_tiles_is_fused_as_without_and_makes_the_same_tokens(
    name: str, quantization: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if problem := packed_linear.find_small_batch_problem():
        pytest.skip(f"products of a few rows: {problem}")
    model = make_tiny(name, tmp_path, **WIDE_ENOUGH[name])
    record, tokens = generate(model, quantization)
    request.getfixturevalue("_all_in_tiles")
    record_in_tiles, tokens_in_tiles = generate(model, quantization)
    assert record_in_tiles["prefill_attention"] == "in AMX tiles"
    assert record_in_tiles["fused_parts"] == record["fused_parts"]
    assert "in AMX tiles" in record_in_tiles["linear_layers"]
    assert tokens_in_tiles == tokens
