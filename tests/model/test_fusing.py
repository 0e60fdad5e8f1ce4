"""Fused modules compute the same as those that they replace, and other modules stay."""

import pickle
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from splitwiser import LLM, SamplingParams
from splitwiser.model import attention, fused
from splitwiser.model.compatibility import _served_logits, attach_engine
from splitwiser.model.fused import FusedMLP, FusedNorm
from splitwiser.model.fusing import describe_parts, fuse_parts
from splitwiser.model.kernels import packed_linear as packed
from splitwiser.model.kernels.int8_linear import quantise_linears
from splitwiser.model.kernels.packed_linear import PackedLinear
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.model.paged_attention import KernelInputs
from splitwiser.study.profile import using_threads
from tests.support.models import TINY, make_tiny
from tests.support.tokens import LENGTHS, prompts_of

pytestmark = pytest.mark.skipif(
    packed.find_packing_problem() is not None, reason=f"cannot pack: {packed.find_packing_problem()}"
)
needs_compiler = pytest.mark.skipif(
    fused.find_compile_problem() is not None, reason=f"not compiled: {fused.find_compile_problem()}"
)
needs_small_batches = pytest.mark.skipif(
    packed.find_small_batch_problem() is not None, reason=f"products of a few rows: {packed.find_small_batch_problem()}"
)

PARTS = {
    "llama": "decoder_layer 3, rms_norm 7, attention 3, gated_mlp 3, decoder 1",
    "mistral": "decoder_layer 3, rms_norm 7, attention 3, gated_mlp 3",
    "qwen3": "decoder_layer 3, rms_norm 13, attention 3, gated_mlp 3, decoder 1",
    "gemma2": "attention 3, gated_mlp 3, rms_norm 13",
    "gpt_oss": "attention 3, rms_norm 7",
    "opt": "decoder_layer 3, attention 3, activation 3, decoder 1",
    **dict.fromkeys(["falcon", "bloom", "mpt", "gptj", "gpt_neo"], "activation 2"),
}


class _Body(PreTrainedModel):
    """A causal model that consists of an embedding and one module."""

    config_class = PreTrainedConfig

    def __init__(self, part: nn.Module, width: int, dtype: torch.dtype) -> None:
        super().__init__(PreTrainedConfig())
        self.part, self.embed = part, nn.Embedding(4, width, dtype=dtype)

    def forward(self, input_ids: torch.Tensor, **_: object) -> Any:
        return type("Output", (), {"logits": self.part(self.embed(input_ids))})


@torch.inference_mode()
def fuse(part: nn.Module, width: int = 96, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return what replaces ``part``, given random weights, in a model of it alone."""
    torch.manual_seed(0)
    for parameter in part.parameters():
        parameter.normal_(0, 0.3)
    model = _Body(part.to(dtype), width, dtype).requires_grad_(False)
    fuse_parts(model)
    made: nn.Module = model.part
    return made


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def assert_same(made: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(made, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


def load(tiny: Callable[[str], Path], name: str, dtype: str = "bfloat16") -> LoadedModel:
    return load_model(tiny(name), dtype=dtype, device="cpu", load_format="auto")


# -- norms


@needs_compiler
@pytest.mark.parametrize("convention", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 5, 3, 96), (1, 700, 96)])
def test_norms_of_both_conventions(convention: type[nn.Module], shape: tuple[int, ...]) -> None:
    own = convention(96, 1e-3)
    made = fuse(own)
    assert isinstance(made, FusedNorm)
    with torch.inference_mode():
        for scale in (1e-2, 1.0, 100.0):
            assert_same(made(inputs(*shape) * scale), own(inputs(*shape) * scale))
        strided = inputs(2, 96, 7).transpose(1, 2)
        assert_same(made(strided), own(strided))


class _Shifted(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 0.05


class _Clamped(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.clamp(-100, 100))


@pytest.mark.parametrize("own", [_Shifted(96), _Clamped(96), nn.LayerNorm(96), nn.LayerNorm(96, bias=False)])
def test_a_norm_that_computes_something_else_stays(own: nn.Module) -> None:
    assert fuse(own) is own


def test_a_part_in_float32_stays() -> None:
    own = LlamaRMSNorm(96)
    assert fuse(own, dtype=torch.float32) is own


# -- gated MLPs


class _MLP(nn.Module):
    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor], bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(96, 160, bias=bias), nn.Linear(96, 160, bias=bias)
        self.down_proj = nn.Linear(160, 96, bias=bias)
        self.act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return product


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(approximate="tanh"), lambda x: x * torch.sigmoid(1.702 * x)])
def test_gated_mlps(activation: Callable[[torch.Tensor], torch.Tensor], bias: bool) -> None:
    own = _MLP(activation, bias)
    made = fuse(own)
    assert isinstance(made, FusedMLP)
    with torch.inference_mode():
        for rows in (1, 300):
            x, residual = inputs(1, rows, 96), inputs(1, rows, 96) + 1
            assert_same(made(x), own(x))
            assert_same(made(x, residual), own(x) + residual)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), lambda x: nn.functional.silu(x).clamp(max=7)])
def test_a_gate_of_another_kind_stays(activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    own = _MLP(activation)
    assert fuse(own) is own


# -- activations after a first linear layer


class _Feed(nn.Module):
    def __init__(self, activation: nn.Module, between: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(96, 160), activation, nn.Linear(160, 96)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.fc2(self.activation_fn(self.fc1(x) + self.between))
        return product


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()])
def test_an_activation_becomes_part_of_the_product(activation: nn.Module) -> None:
    own = _Feed(activation)
    with torch.inference_mode():
        made = fuse(own)
        assert isinstance(own.activation_fn, nn.Identity)
        computed = made(inputs(1, 9, 96))
        first = own.get_submodule("fc1")
        assert isinstance(first, PackedLinear)
        setattr(own, "fc1", first.with_activation(packed.IDENTITY))  # noqa: B010  # it is declared as a plain layer
        own.activation_fn = activation
        assert_same(computed, own(inputs(1, 9, 96)))


class _Choosy(_Feed):
    """Raises an error for some of the inputs of the trial."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x.abs() > 100).any()):
            raise ValueError
        return super().forward(x)


def test_an_activation_of_something_else_stays() -> None:
    for own in (_Feed(nn.Tanh()), _Feed(nn.ReLU(), between=0.5), _Choosy(nn.ReLU())):
        kept = own.activation_fn
        fuse(own)
        first = own.get_submodule("fc1")
        assert isinstance(first, PackedLinear)
        assert (first.activation, own.activation_fn) == (packed.IDENTITY, kept)


# -- models


@needs_compiler
@pytest.mark.parametrize("name", PARTS)
def test_a_model_of_fused_parts_gives_its_logits(name: str, tiny: Callable[[str], Path]) -> None:
    model = load(tiny, name)
    attach_engine(model, pack=True)  # which compares the logits
    assert describe_parts(model.module) == PARTS[name]


@needs_compiler
@needs_small_batches
@pytest.mark.parametrize("name", [name for name, parts in PARTS.items() if "decoder_layer" in parts])
def test_layers_of_a_few_rows_are_one_call(
    name: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny, name)
    layers = attach_engine(model, pack=True)
    calls = count_calls(monkeypatch)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    with torch.inference_mode():
        *_, made = _served_logits(model, layers, prompts)
        assert calls == [len(layers)]
        monkeypatch.setattr(fused, "max_small_rows", lambda: 0)
        *_, expected = _served_logits(model, layers, prompts)
    assert calls == [len(layers)]
    assert_same(made, expected)


@needs_compiler
@needs_small_batches
@pytest.mark.parametrize("name", [name for name, parts in PARTS.items() if "decoder_layer" in parts])
def test_a_loop_over_layers_ends_when_all_are_computed(
    name: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny, name)
    layers = attach_engine(model, pack=True)
    called: list[int] = []
    forward = fused.FusedLayer.forward

    def note(self: fused.FusedLayer, *given: Any, **named: Any) -> torch.Tensor:
        called.append(self.number)
        return forward(self, *given, **named)

    monkeypatch.setattr(fused.FusedLayer, "forward", note)
    step = partial(_served_logits, model, layers, [[5, 6, 7, 8], [9, 10, 11, 12]])
    everyone = list(range(len(layers)))
    last = [part for part in model.module.modules() if isinstance(part, fused.FusedLayer)][-1]
    last.stack._is_whole = False
    vars(model.module).pop("direct", None)  # which needs no loop
    with torch.inference_mode():
        *_, first = step()
        assert called == 3 * everyone  # two steps of prompts, and the decode step that shows what the model does
        called.clear()
        *_, second = step()
        assert called == [*everyone, *everyone, 0]
        hook = last.register_forward_hook(lambda *_: None)
        called.clear()
        *_, third = step()
        assert called == 3 * everyone  # since somebody wants to know
        hook.remove()
        monkeypatch.setattr(fused, "max_small_rows", lambda: 0)
        *_, expected = step()
    for made in (first, second, third):
        assert_same(made, expected)


@needs_compiler
def test_layers_are_a_list_wherever_no_step_is_run(tiny: Callable[[str], Path]) -> None:
    model = load(tiny, "llama")
    attach_engine(model, pack=True)
    layers = model.module.model.layers
    assert [layer.number for layer in layers] == [layer.number for layer in layers[:]] == [0, 1, 2]
    assert [layer.number for layer in layers[1:]] == [1, 2]
    assert [layer.number for layer in layers[::-1]] == [2, 1, 0]
    assert [layers[0].number, layers[-1].number, len(layers)] == [0, 2, 3]


def long_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(5, 60, (137,), generator=generator).tolist() for _ in range(count)]


@needs_compiler
@needs_small_batches
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", [name for name, parts in PARTS.items() if "decoder_layer" in parts])
def test_layers_of_many_rows_are_the_same_in_chunks(
    name: str, quantised: bool, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny, name)
    layers = attach_engine(model, pack=True)
    if quantised:
        quantise_linears(model.module)
    prompts = long_prompts(3)
    made = []
    with torch.inference_mode():
        for threads in (1, 2, 3, 5):  # the last has more threads than there are chunks
            with using_threads(threads):
                made.append(_served_logits(model, layers, prompts)[0])
        monkeypatch.setattr(fused.LayerStack, "struct_for_many_rows", lambda *_: None)
        expected, *_ = _served_logits(model, layers, prompts)
    assert all(torch.equal(each, made[0]) for each in made)
    assert_same(made[0], expected)


@needs_compiler
@needs_small_batches
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_last_layer_computes_what_is_read(
    name: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny, name)
    layers = attach_engine(model, pack=True)
    computed: list[int] = []
    complete = fused._complete_rows

    def note(struct: Any, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        computed.append(residual.shape[1])
        return complete(struct, attended, residual)

    monkeypatch.setattr(fused, "_complete_rows", note)
    prompts = long_prompts(2)
    with torch.inference_mode():
        made, *_ = _served_logits(model, layers, prompts)
        assert computed[: len(layers)] == [274, 274, 2]
        monkeypatch.setattr(fused.FusedLayer, "_find_wanted_rows", lambda *_: None)
        expected, *_ = _served_logits(model, layers, prompts)
    assert_same(made, expected)


class _Router(nn.Module):
    """Computes with the weight of a linear layer that it does not call, beside one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.down = nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scores = nn.functional.linear(hidden_states.float(), self.classifier.weight.float()).to(hidden_states.dtype)
        made: torch.Tensor = self.down(scores)
        return made


def test_a_weight_that_is_read_is_not_packed() -> None:
    made = fuse(_Router())
    assert [type(part) for part in made.children()] == [nn.Linear, PackedLinear]
    assert made(inputs(3, 96)).isfinite().all()


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that the number of layers of each call for small batches will be added to."""
    calls: list[int] = []
    run = fused._run_layers

    def note(first: Any, inputs: KernelInputs, *given: Any) -> Any:
        calls.append(len(inputs.keys))
        return run(first, inputs, *given)

    monkeypatch.setattr(fused, "_run_layers", note)
    return calls


@needs_compiler
@needs_small_batches
def test_a_layer_that_is_given_something_else_is_computed_again(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny, "llama")
    layers = attach_engine(model, pack=True)
    calls = count_calls(monkeypatch)
    last = model.module.model.layers[2]
    last.register_forward_pre_hook(lambda _, given: (given[0] * 2,))
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    with torch.inference_mode():
        *_, first = _served_logits(model, layers, prompts)
        assert calls == [3, 1]
        *_, second = _served_logits(model, layers, prompts)
        assert calls == [3, 1, 2, 1]
        monkeypatch.setattr(fused, "max_small_rows", lambda: 0)
        *_, expected = _served_logits(model, layers, prompts)
    assert_same(first, expected)
    assert_same(second, expected)


@needs_compiler
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_a_float32_model_is_untouched(name: str, tiny: Callable[[str], Path]) -> None:
    model = load(tiny, name, "float32")
    before = list(model.module.modules())
    model.module.set_attn_implementation(attention.NAME)
    with torch.inference_mode():
        fuse_parts(model.module)
    assert list(model.module.modules()) == before


@needs_compiler
@pytest.mark.parametrize(
    ("name", "changes", "described"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, PARTS["llama"]),
        ("stablelm", {"partial_rotary_factor": 0.5}, "attention 3, gated_mlp 3"),  # half a head turns
        ("granite", {"residual_multiplier": 0.2}, "attention 3, gated_mlp 3, rms_norm 7"),  # no layer adds plainly
        ("olmo", {"clip_qkv": 8.0}, "gated_mlp 3"),  # keys have a limit
        ("olmo2", {}, "rms_norm 13, gated_mlp 3"),  # norms of all heads together
        ("cohere", {}, "gated_mlp 3"),  # neighbours turn together
        ("hunyuan_v1_dense", {"head_dim": 16}, "rms_norm 13, gated_mlp 3"),  # heads are normalised once turned
        ("ministral3", {"head_dim": 16}, "gated_mlp 3, rms_norm 7"),  # queries are scaled from a late position on
    ],
)
def test_what_is_not_alike_stays(
    name: str, changes: dict[str, Any], described: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, name, TINY["llama"])
    model = load_model(make_tiny(name, tmp_path, **changes), dtype="bfloat16", device="cpu", load_format="auto")
    attach_engine(model, pack=True)
    assert describe_parts(model.module) == described


@needs_compiler
def test_a_second_copy_of_the_weights_never_exists(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny, "llama")
    own = [weakref.ref(part) for part in model.module.modules() if type(part) is nn.Linear]
    living: list[int] = []
    init = PackedLinear.__init__

    def count(self: PackedLinear, *given: Any, **named: Any) -> None:
        living.append(sum(reference() is not None for reference in own))
        init(self, *given, **named)

    monkeypatch.setattr(PackedLinear, "__init__", count)
    attach_engine(model, pack=True)
    # each layer makes two products of the three of its MLP, then two of the four of its attention; what is left is the head
    of_mlps = [len(own) - 3 * layer for layer in range(3) for _ in range(2)]
    of_attentions = [len(own) - 9 - 4 * layer for layer in range(3) for _ in range(2)]
    assert living == [*of_mlps, *of_attentions, 1]


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_fused_parts_travel(name: str, tiny: Callable[[str], Path]) -> None:
    model = load(tiny, name)
    attach_engine(model, pack=True)
    layer = model.module.model.layers[0].self_attn
    copied = pickle.loads(pickle.dumps(model.module)).model.layers[0].self_attn
    with torch.inference_mode():
        expected = layer.qkv_proj(inputs(1, 3, 48))
        layer.qkv_proj.packed.zero_()
        assert torch.equal(copied.qkv_proj(inputs(1, 3, 48)), expected)


@needs_compiler
@needs_small_batches
@pytest.mark.skipif(not packed.supports_compression(), reason="this processor lacks the instructions")
def test_a_stack_of_layers_finds_weights_that_were_compressed_after_it_ran(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_compressed_is_faster", lambda: False)
    prompts = prompts_of([5, 9], seed=8)
    with LLM(tiny("llama"), dtype="bfloat16") as llm:
        before = [each.token_ids for each in llm.generate(prompts, SamplingParams(max_tokens=6))]
        layers = llm.model.module.model.layers
        assert layers[1].self_attn.qkv_proj.compress()  # and the first one's stays where it is
        assert layers[0].stack._find_structs()[0][1].qkv.compressed
        assert [each.token_ids for each in llm.generate(prompts, SamplingParams(max_tokens=6))] == before


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_processes_make_the_same_tokens(name: str, tiny: Callable[[str], Path]) -> None:
    made = []
    placements: list[dict[str, Any]] = [{}, {"mode": "mp"}]
    for settings in placements:
        with LLM(tiny(name), dtype="bfloat16", max_batch=1, prefill_tokens=512, **settings) as llm:
            assert llm.started.kernels["fused_parts"] == PARTS[name]
            outputs = [llm.generate([each], SamplingParams(max_tokens=12))[0] for each in prompts_of(LENGTHS, seed=8)]
            made.append([output.token_ids for output in outputs])
    assert made[0] == made[1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "parts"),
    [("llama", "rms_norm 7"), ("qwen3", "rms_norm 13"), ("gemma2", "none (no module of the model matches one)")],
)
def test_a_gpu_has_norms_of_one_kernel(name: str, parts: str, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny(name), dtype="bfloat16", device="cuda", load_format="auto")
    attach_engine(model, pack=True)  # which compares the logits
    assert describe_parts(model.module) == parts


def test_plain_kernels_fuse_nothing(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("llama"), dtype="bfloat16", kernels="plain") as llm:
        assert llm.started.kernels["fused_parts"] == "none (as asked for)"


def test_without_a_compiler_activations_alone_are_fused(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fused._functions.cache_clear()
    for name, described in (("opt", "activation 3"), ("llama", "none (plain PyTorch (no g++ on PATH))")):
        model = load(tiny, name)
        attach_engine(model, pack=True)
        assert describe_parts(model.module) == described
