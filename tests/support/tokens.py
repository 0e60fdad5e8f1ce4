"""Prompts, and the tokens that ``model.generate`` makes of each alone."""

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, PreTrainedModel

from splitwiser.model.checkpoints.weights import auto_class
from splitwiser.model.kv_pool import block_nbytes
from splitwiser.model.loading import load_model
from splitwiser.model.routes import ROUTES
from tests.support.models import VOCABULARY

ENCODER_DECODERS = [
    "t5", "flan_t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "m2m_100",
    "plbart",
]  # fmt: skip
SERVED = ["opt", "llama", "gpt2", "qwen3", "mistral", "gemma2", "gpt_oss"]
DISPATCHED = [
    "falcon", "falcon_new", "falcon_rw", "bloom", "mpt", "gptj", "codegen", "gpt_neo", "xglm", "biogpt",
    "gpt_neox_japanese", "openai-gpt",
]  # fmt: skip
IMPLEMENTATIONS = {"falcon": "sdpa"}  # transformers' default; its eager attention adds ALiBi twice
LENGTHS = [1, 5, 40, 100, 17, 2, 63, 16, 1]


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


@cache
def reference_model(directory: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(directory)
    model: PreTrainedModel = auto_class(config).from_pretrained(
        directory, dtype=torch.float32, attn_implementation=IMPLEMENTATIONS.get(config.model_type, "eager")
    )
    return model


@cache
def reference(directory: Path, prompt: tuple[int, ...], new_tokens: int) -> tuple[int, ...]:
    model = reference_model(directory)
    generate = cast("Callable[..., torch.Tensor]", model.generate)
    ids = torch.tensor([prompt])
    tokens = generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    given = 1 if model.config.is_encoder_decoder else len(prompt)
    return tuple(tokens[0, given:].tolist())


def references(directory: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The tokens that ``model.generate`` makes of each prompt, computed once in a session."""
    return [list(reference(directory, tuple(prompt), new_tokens)) for prompt in prompts]


def room_for(directory: Path, tokens: int) -> str:
    """A ``kv_memory`` with room for ``tokens`` tokens."""
    model = load_model(directory, dtype="float32", device="cpu", load_format="auto")
    return f"{block_nbytes(ROUTES[model.kind].attach(model), 16, model.dtype) * (tokens // 16)}B"
