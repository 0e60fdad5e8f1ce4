"""The table of modules that take the place of a model's own, so that it attends through the engine."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from splitwiser.model import attention
from splitwiser.model.dispatch import bloom, falcon, gpt_neo, gpt_neox_japanese, gptj, mpt, openai_gpt, xglm
from splitwiser.model.dispatch.base import DispatchedAttention

RECURRENT = "keeps a recurrent state for each request, which the engine cannot serve yet"

# by a class of transformers: given the model, what makes the module that takes the place of one of this class
REPLACEMENTS: dict[str, Callable[[PreTrainedModel], Callable[[Any], nn.Module]]] = {
    "modeling_bloom.BloomAttention": bloom.make_attention,
    "modeling_codegen.CodeGenAttention": gptj.make_codegen,
    "modeling_falcon.FalconAttention": falcon.make_attention,
    "modeling_falcon.FalconLinear": falcon.make_linear,
    "modeling_gpt_neo.GPTNeoSelfAttention": gpt_neo.make_attention,
    "modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": gpt_neox_japanese.make_attention,
    "modeling_gptj.GPTJAttention": gptj.make_gptj,
    "modeling_mpt.MptAttention": mpt.make_attention,
    "modeling_openai.Attention": openai_gpt.make_attention,
    "modeling_xglm.XGLMAttention": xglm.make_attention,
}


def find_dispatch_problem(module: PreTrainedModel) -> str | None:
    """Return why the engine cannot replace the attention of ``module``, in one line; None if it can. ``module`` needs no
    weights."""
    name = type(module).__name__
    if module._is_stateful:
        return f"{name} {RECURRENT}; use --mode generate"
    if module._can_set_attn_implementation() or any(_class_of(part) in REPLACEMENTS for part in module.modules()):
        return None
    return (
        f"{name} does not dispatch its attention through transformers' attention interface, so the engine cannot serve it; "
        "use --mode generate"
    )


def dispatch_attention(module: PreTrainedModel) -> None:
    """Let the attention layers of ``module``, for which :func:`find_dispatch_problem` found none, attend through the
    engine."""
    if module._can_set_attn_implementation():
        module.set_attn_implementation(attention.NAME)
        return
    makers = {
        kind: make(module) for kind, make in REPLACEMENTS.items() if kind in set(map(_class_of, module.modules()))
    }
    _replace(module, makers)
    module.config._attn_implementation = attention.NAME  # for its masks


def describe_route(module: nn.Module) -> str:
    """Return how the engine serves ``module``, for a run's record."""
    ours = {type(part).__name__ for part in module.modules() if isinstance(part, DispatchedAttention)}
    return "packed" + "".join(f", with this project's {name}" for name in sorted(ours))


def _replace(module: nn.Module, makers: dict[str, Callable[[Any], nn.Module]]) -> None:
    for name, part in list(module.named_children()):
        _replace(part, makers)
        if make := makers.get(_class_of(part)):
            setattr(module, name, make(part).train(part.training))


def _class_of(part: nn.Module) -> str:
    return f"{type(part).__module__.rpartition('.')[2]}.{type(part).__name__}"
