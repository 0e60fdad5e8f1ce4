"""A decoder called directly computes what its own forward does, and one that does anything else around its layers is left to
its own forward."""

import pickle
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from splitwiser.model import fused
from splitwiser.model.compatibility import _served_logits, attach_engine
from splitwiser.model.direct import direct_decoder
from splitwiser.model.kernels import packed_linear as packed
from splitwiser.model.kernels.int8_linear import quantise_linears
from splitwiser.model.kernels.interface import LayerShape
from splitwiser.model.loading import LoadedModel, load_model

pytestmark = [
    pytest.mark.skipif(
        packed.find_packing_problem() is not None, reason=f"cannot pack: {packed.find_packing_problem()}"
    ),
    pytest.mark.skipif(
        fused.find_compile_problem() is not None, reason=f"not compiled: {fused.find_compile_problem()}"
    ),
]
NAMES = ["llama", "qwen3", "opt"]
PROMPTS = [[5, 6, 7, 8, 30, 31], [9, 10, 11, 12, 13, 14]]


def attach(path: Path) -> tuple[LoadedModel, list[LayerShape]]:
    model = load_model(path, dtype="bfloat16", device="cpu", load_format="auto")
    return model, attach_engine(model, pack=True)


@torch.inference_mode()
def logits_of(model: LoadedModel, layers: list[LayerShape]) -> torch.Tensor:
    """Logits of prefill steps and of a decode step."""
    return torch.stack(_served_logits(model, layers, PROMPTS))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_its_logits_are_those_of_the_models_own_forward(
    name: str, quantised: bool, tiny: Callable[[str], Path]
) -> None:
    model, layers = attach(tiny(name))
    if quantised:
        quantise_linears(model.module)  # and so other modules take the places of those that were tried
    direct = logits_of(model, layers)
    assert vars(model.module).pop("direct")
    own = logits_of(model, layers)
    assert torch.equal(direct[:2], own[:2])
    # a decode step's last norm is the compiled one, which may round a number differently than PyTorch's
    torch.testing.assert_close(direct[2], own[2], atol=0.01 * float(own.abs().max()), rtol=0.01)


@pytest.mark.skipif(packed.find_small_batch_problem() is not None, reason="a processor without products of a few rows")
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_is_one_call(
    name: str, quantised: bool, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layers = attach(tiny(name))
    if quantised:
        quantise_linears(model.module)
    called: list[str] = []
    run, head = fused._run_layers, model.module.get_output_embeddings()
    multiply = type(head).forward

    def note_layers(*given: Any) -> torch.Tensor:
        called.append("all at once")
        return run(*given)

    def note_product(self: torch.nn.Module, *given: Any) -> torch.Tensor:
        if self is head:
            called.append("head")
        made: torch.Tensor = multiply(self, *given)
        return made

    monkeypatch.setattr(fused, "_run_layers", note_layers)
    monkeypatch.setattr(type(head), "forward", note_product)
    logits_of(model, layers)
    assert called == ["head", "head", "all at once"]
    hook = head.register_forward_hook(lambda *_: None)
    called.clear()
    logits_of(model, layers)
    assert called == ["head", "head", "all at once", "head"]  # since somebody wants to know
    hook.remove()


def test_a_hook_on_the_model_has_its_own_forward_called(tiny: Callable[[str], Path]) -> None:
    model, layers = attach(tiny("llama"))
    calls: list[object] = []
    hook = model.module.register_forward_hook(lambda *_: calls.append(None))
    with_hook = logits_of(model, layers)
    assert len(calls) == 3
    hook.remove()
    assert torch.equal(logits_of(model, layers)[:2], with_hook[:2])
    assert len(calls) == 3


def change_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaModel.forward

    @wraps(forward)
    def scaled(self: LlamaModel, input_ids: torch.Tensor, **named: Any) -> Any:
        named["inputs_embeds"] = self.embed_tokens(input_ids) * 1.25
        return forward(self, **named)

    monkeypatch.setattr(LlamaModel, "forward", scaled)


def normalise_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaModel.forward

    @wraps(forward)
    def normalised(self: LlamaModel, *given: Any, **named: Any) -> Any:
        output = forward(self, *given, **named)
        output.last_hidden_state = self.norm(output.last_hidden_state)
        return output

    monkeypatch.setattr(LlamaModel, "forward", normalised)


def change_output(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        forward = LlamaForCausalLM.forward

        @wraps(forward)
        def changed(self: LlamaForCausalLM, *given: Any, **named: Any) -> Any:
            output = forward(self, *given, **named)
            output.logits = change(output.logits)
            return output

        monkeypatch.setattr(LlamaForCausalLM, "forward", changed)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change_embeddings, id="scaled embeddings"),
        pytest.param(normalise_twice, id="a second norm"),
        pytest.param(change_output(lambda logits: logits / 8), id="scaled logits"),
        # which logits of random weights are far too small to show
        pytest.param(change_output(lambda logits: 30 * torch.tanh(logits / 30)), id="capped logits"),
    ],
)
def test_a_model_that_does_more_is_left_to_its_own_forward(
    change: Callable[[pytest.MonkeyPatch], None], tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    model, _ = attach(tiny("llama"))
    assert direct_decoder(model.module) is None


def test_a_window_is_left_to_the_models_own_forward(tiny: Callable[[str], Path]) -> None:
    model, _ = attach(tiny("mistral"))
    assert direct_decoder(model.module) is None


def test_a_copy_has_modules_of_its_own(tiny: Callable[[str], Path]) -> None:
    model, _ = attach(tiny("opt"))
    copied = pickle.loads(pickle.dumps(model.module))
    made = direct_decoder(copied)
    assert made is not None
    assert made.module is copied
    assert made.body is copied.model.decoder
