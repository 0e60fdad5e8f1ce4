"""Which encoder-decoders are served, in which form, and why others are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitwiser.errors import UnsupportedModelError
from splitwiser.model import trials
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kernels.packed_linear import PackedLinear, find_packing_problem
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.model.seq2seq import attach
from splitwiser.model.seq2seq.attach import attach_engine, padding_changes_tokens, try_kernels
from splitwiser.model.seq2seq.parts import replace_parts
from splitwiser.model.seq2seq.steps import EncoderStep

T5_LAYERS = [LayerShape(4, 12, 12)] * 2
PACKS = pytest.mark.skipif(find_packing_problem() is not None, reason=str(find_packing_problem()))


def load(directory: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(directory, dtype=dtype, device="cpu", load_format="auto")


def test_a_layer_of_the_pool_is_one_of_the_decoder(tiny: Callable[[str], Path]) -> None:
    assert attach_engine(load(tiny("t5"))) == T5_LAYERS
    assert attach_engine(load(tiny("bart"))) == [LayerShape(6, 8, 8)] * 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("switch_transformers", "an expert takes no more than expert_capacity tokens of a step"),
        ("longt5", "cannot be served by the engine"),
        ("mvp", "does not dispatch its attention"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_in_one_line(
    name: str, reason: str, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as refused:
        attach_engine(load(tiny(name)))
    assert "use --mode generate" in refused.value.cli_message
    assert "\n" not in str(refused.value)


def test_sources_that_see_each_other_are_noticed(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def as_one(lengths: list[int], device: torch.device, _: torch.Tensor | None) -> EncoderStep:
        return EncoderStep([sum(lengths)], device)

    monkeypatch.setattr("splitwiser.model.seq2seq.forward.EncoderStep", as_one)
    with pytest.raises(UnsupportedModelError, match="two packed sources do not give the same logits as each alone"):
        attach_engine(load(tiny("t5")))


def test_answers_at_wrong_positions_are_noticed(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, max_positions: int) -> None:
        replace_parts(module, max_positions)
        module.get_decoder().embed_positions.table.copy_(module.get_decoder().embed_positions.table.roll(1, 0))

    monkeypatch.setattr(attach, "replace_parts", wrong)
    with pytest.raises(UnsupportedModelError, match="two packed sources do not give the same logits as each alone"):
        attach_engine(load(tiny("bart")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_that_makes_more_of_rounding_is_measured_by_that(
    dtype: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trials.BOUNDS, getattr(torch, dtype), 1e-6)  # as if packing had rounded differently
    assert attach_engine(load(tiny("t5"), dtype)) == T5_LAYERS


def test_no_rounding_excuses_all_differences(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny("t5"), "bfloat16")

    def spoil(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return output.flip(-1) if output.shape[1] == 10 else output  # the tokens of two sources

    model.module.get_submodule("encoder.final_layer_norm").register_forward_hook(spoil)
    monkeypatch.setattr("splitwiser.model.attach._find_rounding", lambda *_: 10.0)
    with pytest.raises(UnsupportedModelError, match="two packed sources do not give the same logits as each alone"):
        attach_engine(model)


@PACKS
@pytest.mark.parametrize("name", ["t5", "mt5", "bart"])
def test_linear_layers_are_packed_and_found_again(name: str, tiny: Callable[[str], Path]) -> None:
    first, again = (load(tiny(name), "bfloat16") for _ in range(2))
    assert attach_engine(first, pack=True, remember=True) == attach_engine(again, pack=True, remember=True)
    kinds = [[type(part) for part in model.module.modules()] for model in (first, again)]
    assert kinds[0] == kinds[1]
    assert PackedLinear in kinds[0]
    assert torch.nn.Linear not in kinds[0]


def test_a_kernel_that_is_wrong_is_not_used(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("t5"))
    layers = attach_engine(model)

    def zeros(query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.zeros_like(query)

    assert try_kernels(model, layers, PoolKernels(decode=zeros), 16) == {"decode": "its logits differ from PyTorch's"}
    assert try_kernels(model, layers, PoolKernels(), 16) == {}


@pytest.mark.parametrize("name", ["umt5", "bart"])
def test_padding_on_the_right_changes_no_token(name: str, tiny: Callable[[str], Path]) -> None:
    assert not padding_changes_tokens(load(tiny(name)))
