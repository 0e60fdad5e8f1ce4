"""Which models the engine takes on, and why it refuses the others."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitwiser import LLM, SamplingParams
from splitwiser.errors import UnsupportedModelError
from splitwiser.model import attach, trials
from splitwiser.model.checkpoints.configuration import DTYPES
from splitwiser.model.compatibility import attach_engine, padding_changes_tokens, try_kernels
from splitwiser.model.kernels.choose import load_kernels
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.loading import LoadedModel, load_model
from tests.support.models import POSITIONS, make_tiny


def load(directory: Path) -> LoadedModel:
    return load_model(directory, dtype="float32", device="cpu", load_format="auto")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("roformer", "RoFormerForCausalLM does not dispatch its attention through transformers' attention interface"),
        ("mamba", "MambaForCausalLM keeps a recurrent state for each request"),
        ("deepseek_v32", "DeepseekV32ForCausalLM keeps an index of all tokens"),
        ("moshi", "MoshiForCausalLM: a layer has a window of 9 tokens in the cache alone"),
        ("jamba", "JambaForCausalLM keeps a recurrent state for each request"),
        ("lfm2", "Lfm2ForCausalLM keeps a recurrent state for each request"),
        (
            "llama4_text",
            "Llama4ForCausalLM: at later positions packed prompts do not give the same logits as each alone",
        ),
    ],
)
def test_refuses_by_what_the_model_does(name: str, reason: str, tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        attach_engine(load(tiny(name)))
    assert "use mode generate" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["roformer", "mamba", "llama4_text"])
def test_mode_generate_serves_what_the_engine_refuses(name: str, tiny: Callable[[str], Path]) -> None:
    with LLM(tiny(name), mode="generate") as llm:
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(output.token_ids) == 3


def test_layer_shapes_are_what_the_layers_pass(tiny: Callable[[str], Path]) -> None:
    assert attach_engine(load(tiny("llama"))) == [LayerShape(kv_heads=2, key_dim=12, value_dim=12)] * 3


def test_refuses_attention_that_looks_ahead(tmp_path: Path) -> None:
    model = load(make_tiny("llama", tmp_path, is_causal=False))
    with pytest.raises(UnsupportedModelError, match="looks at later tokens"):
        attach_engine(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_refuses_a_model_that_mixes_packed_requests(dtype: str, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("opt"), dtype=dtype, device="cpu", load_format="auto")
    layer = model.module.model.decoder.layers[1]
    assert isinstance(layer, torch.nn.Module)

    def shift(_: torch.nn.Module, __: object, output: Tensor) -> Tensor:
        return output + 0.5 * output.roll(1, dims=1)  # as a convolution over the row would

    layer.register_forward_hook(shift)
    with pytest.raises(UnsupportedModelError, match="two packed prompts do not give the same logits"):
        attach_engine(model)


# two prompts of 5 tokens: prefill of all, of their later 3, and decode of their last
@pytest.mark.parametrize("tokens", [10, 6, 2], ids=["prefill", "chunked prefill", "decode"])
def test_refuses_a_model_that_is_wrong_in_one_kind_of_step(tokens: int, tiny: Callable[[str], Path]) -> None:
    model = load(tiny("opt"))

    def spoil(_: torch.nn.Module, __: object, output: Tensor) -> Tensor:
        return output.flip(-1) if output.shape[1] == tokens else output

    model.module.model.decoder.layers[1].register_forward_hook(spoil)
    with pytest.raises(UnsupportedModelError, match="two packed prompts do not give the same logits"):
        attach_engine(model)


def test_refuses_parts_that_are_fused_wrongly(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fuse_wrongly(module: torch.nn.Module, *_: object) -> None:
        module.get_parameter("model.norm.weight").data.neg_()

    monkeypatch.setattr("splitwiser.model.attach.fuse_parts", fuse_wrongly)
    model = load_model(tiny("llama"), dtype="bfloat16", device="cpu", load_format="auto")
    with pytest.raises(UnsupportedModelError, match="its logits change when its modules are fused"):
        attach_engine(model, pack=True)


def test_refuses_an_attention_argument_it_does_not_know(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    layer = model.module.model.layers[0].self_attn

    def add(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return args, {**kwargs, "head_scales": torch.ones(1)}

    layer.register_forward_pre_hook(add, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="LlamaAttention asks its attention for head_scales"):
        attach_engine(model)


def test_refuses_layers_that_do_not_store(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    layers = model.module.model.layers
    layers[1] = layers[0]  # its K and V would be stored twice in layer 0
    with pytest.raises(UnsupportedModelError, match="K and V are stored 3 times and attended to 3 times"):
        attach_engine(model)


def test_a_scale_that_begins_half_way_is_seen_at_random_weights_too(tmp_path: Path) -> None:
    changes = {"floor_scale": POSITIONS // 2, "attn_scale": 0.1}
    directory = make_tiny("llama4_text", tmp_path, **changes)
    model = load_model(directory, dtype="float32", device="cpu", load_format="dummy")
    with pytest.raises(UnsupportedModelError, match="at later positions"):
        attach_engine(model)


def test_refuses_a_model_that_computes_by_the_longest_position_of_a_step(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    rotary = model.module.model.rotary_emb
    assert isinstance(rotary, torch.nn.Module)

    def shrink(_: torch.nn.Module, args: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        late = float(args[1].max() >= POSITIONS // 2)
        return output[0] * (1 + late), output[1]

    rotary.register_forward_hook(
        lambda part, args, kwargs, output: shrink(part, (args[0], kwargs["position_ids"]), output), with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match="at later positions"):
        attach_engine(model)


@pytest.mark.parametrize("name", ["opt", "llama", "gemma2", "falcon", "falcon_rw", "bloom", "mpt", "mamba"])
def test_padding_that_is_masked_changes_no_tokens(name: str, tiny: Callable[[str], Path]) -> None:
    assert not padding_changes_tokens(load(tiny(name)))


def test_padding_that_moves_positions_changes_tokens(tiny: Callable[[str], Path]) -> None:
    assert padding_changes_tokens(load(tiny("llama4_text")))


def test_padding_that_is_seen_changes_tokens(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("opt"))
    layer = model.module.model.decoder.layers[1]
    assert isinstance(layer, torch.nn.Module)
    layer.register_forward_hook(lambda _, __, output: output + 0.1 * output.mean(dim=1, keepdim=True))
    assert padding_changes_tokens(model)


def test_a_model_that_fails_in_the_trial_is_not_padded(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("opt"))
    model.module.register_forward_pre_hook(broken)
    assert padding_changes_tokens(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding_of_half_precisions_is_no_reason_to_refuse(dtype: str, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("gemma2"), dtype=dtype, device="cpu", load_format="auto")
    assert len(attach_engine(model)) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_that_makes_more_of_rounding_is_measured_by_that(
    dtype: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trials.BOUNDS, DTYPES[dtype], 1e-6)  # as if packing had rounded differently
    model = load_model(tiny("gemma2"), dtype=dtype, device="cpu", load_format="auto")
    assert len(attach_engine(model)) == 3


def test_no_rounding_excuses_all_differences(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "_find_rounding", lambda *_: 10.0)
    model = load_model(tiny("opt"), dtype="bfloat16", device="cpu", load_format="auto")
    layer = model.module.model.decoder.layers[1]
    assert isinstance(layer, torch.nn.Module)
    layer.register_forward_hook(lambda _, __, output: output + output.roll(1, dims=1))
    with pytest.raises(UnsupportedModelError, match="two packed prompts do not give the same logits"):
        attach_engine(model)


class TritonLikeError(Exception):
    """Triton's errors have no base in common with PyTorch's."""


def broken(*_: Any, **__: Any) -> Tensor:
    raise TritonLikeError("out of resource: shared memory\nRequired: 264512")


def forgetful(*given: Any, **_: Any) -> Tensor:
    """Attends to each token's own value alone."""
    query, _, values = given[:3]
    heads = query.shape[1] // values.shape[1]
    return torch.as_tensor(values[-len(query) :]).repeat_interleave(heads, dim=1)


def test_a_kernel_that_fails_or_computes_something_else_is_refused_with_the_reason(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    layers = attach_engine(model)
    tried = try_kernels(model, layers, PoolKernels(decode=broken, varlen=forgetful), 16)
    assert tried == {
        "decode": "TritonLikeError: out of resource: shared memory",
        "varlen": "its logits differ from PyTorch's",
    }


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
def test_a_kernel_that_computes_the_same_is_not_refused(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("mistral"))
    layers = attach_engine(model)
    kernels, _ = load_kernels("auto", model.device, model.dtype, layers)
    assert kernels.decode is not None
    assert try_kernels(model, layers, kernels, 16) == {}
