"""Tiny random models, by architecture."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from transformers import AutoConfig

from splitwiser.model.tiny import POSITIONS, VOCABULARY, save_tiny, tiny_config

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_ROTARY: dict[str, Any] = {
    **_COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **_ROTARY, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 48, "max_position_embeddings": POSITIONS},
    "llama": _ROTARY,
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS,
             "bos_token_id": 1, "eos_token_id": 2},
    "qwen3": {**_ROTARY, "head_dim": 16},
    "mistral": {**_ROTARY, "sliding_window": 9},
    "gemma2": {**_ROTARY, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gpt_oss": {**_ROTARY, "head_dim": 16, "sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "deepseek_v3": {**_LATENT, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                    "topk_group": 1, "first_k_dense_replace": 1},
    "minicpm3": _LATENT,
    "llama4_text": {**_ROTARY, "head_dim": 12, "intermediate_size_mlp": 96, "num_local_experts": 2,
                    "no_rope_layers": [1, 0, 1], "attention_chunk_size": 256, "floor_scale": 16, "attn_scale": 0.5},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip


# earlier versions take the length of bloom's bias from the tokens that a cache counts, so that nothing can be shown of it
BLOOM = pytest.param(
    "bloom",
    marks=pytest.mark.skipif(Version(version("transformers")) < Version("5.23"), reason="needs transformers 5.23"),
)


def make_tiny(name: str, directory: Path, **changes: Any) -> Path:
    """Save a tiny random model of architecture ``name``, with the figures of TINY or else those of ``models --check``; its
    weights are wide enough that tokens differ clearly."""
    figures = {**TINY.get(name, {}), **changes}
    config = AutoConfig.for_model(name, **figures) if name in TINY else tiny_config(name, **changes)
    return save_tiny(config, directory, seed=sum(name.encode()))
