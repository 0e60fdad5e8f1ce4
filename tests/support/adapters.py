"""Adapters of tiny models, made with peft, and the tokens that peft's own forward gives with them."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from splitwiser.model.checkpoints.weights import auto_class

pytest.importorskip("peft", reason="needs the extra adapters")

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

# layers of the attention and of the rest; GPT-2's keep their weights the other way round
DECODERS = {
    "opt": (["q_proj", "v_proj"], ["k_proj", "fc1"]),
    "llama": (["q_proj", "v_proj"], ["o_proj", "gate_proj"]),
    "gpt2": (["c_attn"], ["c_fc", "c_proj"]),
}
ENCODER_DECODERS = {
    "t5": (["q", "v"], ["k", "o", "wi", "wo"]),
    "flan_t5": (["q", "v"], ["k", "o", "wi_1", "wo"]),
    "bart": (["q_proj", "v_proj"], ["k_proj", "fc1"]),
}
LAYERS = DECODERS | ENCODER_DECODERS
ADAPTERS = ["lora", "rslora", "prefix", "projected prefix", "prompt", "p-tuning"]
DIFFERENT: dict[str, dict[str, Any]] = {  # of all these, something that cannot be done for single requests
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
}


def lora(architecture: str, which: int = 0, **settings: Any) -> LoraConfig:
    layers = LAYERS[architecture][which]
    is_transposed = architecture == "gpt2"
    return LoraConfig(task_type=_task(architecture), target_modules=layers, fan_in_fan_out=is_transposed, **settings)


def _task(architecture: str) -> str:
    return "SEQ_2_SEQ_LM" if architecture in ENCODER_DECODERS else "CAUSAL_LM"


def config_of(name: str, architecture: str) -> PeftConfig:
    """The numbers of virtual tokens fill no block, two blocks, and two blocks and a part."""
    task = _task(architecture)
    makers: dict[str, Callable[[], PeftConfig]] = {
        "lora": lambda: lora(architecture, r=4),
        "rslora": lambda: lora(architecture, 1, r=8, lora_alpha=4, use_rslora=True),
        "prefix": lambda: PrefixTuningConfig(task_type=task, num_virtual_tokens=10),
        "projected prefix": lambda: PrefixTuningConfig(
            task_type=task, num_virtual_tokens=32, prefix_projection=True, encoder_hidden_size=32
        ),
        "prompt": lambda: PromptTuningConfig(task_type=task, num_virtual_tokens=37),
        "p-tuning": lambda: PromptEncoderConfig(task_type=task, num_virtual_tokens=10, encoder_hidden_size=32),
    }
    return lora(architecture, r=4, **DIFFERENT[name]) if name in DIFFERENT else makers[name]()


def _base(model: Path) -> PreTrainedModel:
    kind = auto_class(AutoConfig.from_pretrained(model))
    base: PreTrainedModel = kind.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    return base


@cache
def make_adapter(name: str, model: Path) -> Path:
    """Save a random adapter of ``model`` beside it, large enough that it changes tokens."""
    directory = model.parent / f"{model.name}-{name}"
    adapter = get_peft_model(_base(model), config_of(name, model.name.removeprefix("tiny-")))
    random = torch.Generator().manual_seed(sum(name.encode()))
    for path, parameter in adapter.named_parameters():
        scale = 0.3 if "lora_" in path or "bias" in path else 0.7
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=random), alpha=scale)
    adapter.save_pretrained(str(directory))
    return directory


@cache
def _opened(name: str, model: Path) -> PeftModel | PreTrainedModel:
    base = _base(model)
    return base if name == "none" else PeftModel.from_pretrained(base, make_adapter(name, model)).eval()


@cache
def _tokens(name: str, model: Path, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
    opened = _opened(name, model)
    encodes = opened.config.is_encoder_decoder
    given = [opened.config.decoder_start_token_id] if encodes else list(prompt)
    tokens = list(given)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(new_tokens):
            ids = torch.tensor([list(prompt) if encodes else tokens])
            decoded = {"decoder_input_ids": torch.tensor([tokens])} if encodes else {}
            logits = opened(input_ids=ids, attention_mask=torch.ones_like(ids), **decoded).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(given) :]


def peft_tokens(name: str, model: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The greedy tokens of each prompt with the adapter ``name`` (``none``: without), by a whole forward of peft's model for
    each: its ``generate`` loses virtual tokens with transformers 5.24."""
    return [_tokens(name, model, tuple(prompt), new_tokens) for prompt in prompts]
