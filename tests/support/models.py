"""Tiny random models, by architecture."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from splitwiser import constants
from splitwiser.model.checkpoints.catalog import EMBEDDED_MODEL
from splitwiser.model.tiny import POSITIONS as POSITIONS
from splitwiser.model.tiny import VOCABULARY as VOCABULARY
from splitwiser.model.tiny import save_tiny, tiny_config

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
_RELATIVE: dict[str, Any] = {
    "model_type": "t5", "vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 3,
    "num_decoder_layers": 2, "num_heads": 4, "tie_word_embeddings": False, "relative_attention_max_distance": 32,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_LEARNED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False, "decoder_start_token_id": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
_FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
_GPTJ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 6, "n_positions": POSITIONS, **_SPECIAL
}  # fmt: skip
# by the name of an architecture, or by a name of our own with the architecture's as ``model_type``
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
    "falcon": _FALCON,
    "falcon_new": {**_FALCON, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_rw": {**_FALCON, "model_type": "falcon", "multi_query": False, "parallel_attn": False, "bias": True,
                  "alibi": True, "max_position_embeddings": 512},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 3},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 2, "n_heads": 3, "max_seq_len": POSITIONS,
            "attn_config": {"clip_qkv": 2.0}},
    "gptj": _GPTJ,
    "codegen": {**_GPTJ, "n_ctx": POSITIONS},
    "gpt_neo": {"vocab_size": VOCABULARY, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "window_size": 9,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": POSITIONS, **_SPECIAL},
    "xglm": {"vocab_size": VOCABULARY, "d_model": 48, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4,
             "max_position_embeddings": POSITIONS},
    "biogpt": {**_COMMON, "intermediate_size": 96, "max_position_embeddings": POSITIONS},
    "gpt_neox_japanese": {**_COMMON, "intermediate_multiple_size": 2, "max_position_embeddings": POSITIONS, **_SPECIAL},
    "openai-gpt": {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
    "roformer": {**_COMMON, "intermediate_size": 96, "is_decoder": True},
    "t5": {**_RELATIVE, "tie_word_embeddings": True},
    "flan_t5": {**_RELATIVE, "feed_forward_proj": "gated-gelu"},
    "mt5": {**_RELATIVE, "model_type": "mt5"},
    "umt5": {**_RELATIVE, "model_type": "umt5"},
    "switch_transformers": {**_RELATIVE, "model_type": "switch_transformers", "num_experts": 2},
    "longt5": {**_RELATIVE, "model_type": "longt5"},
    "bart": _LEARNED,
    "mbart": _LEARNED,
    "pegasus": _LEARNED,
    "marian": _LEARNED,
    "blenderbot": _LEARNED,
    "blenderbot-small": _LEARNED,
    "m2m_100": _LEARNED,
    "plbart": _LEARNED,
    "mvp": _LEARNED,
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip


CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message["role"] == "system" %}{{ raise_exception("no system here") }}{% endif %}\
### findings: {{ message["content"] }}{% endfor %}{% if add_generation_prompt %} ### impressions:{% endif %}"""


def make_chatty(directory: Path) -> Path:
    """Save the embedded model with a chat template that writes its usual prompt."""
    shutil.copytree(constants.DIR_PROJECT / "models" / EMBEDDED_MODEL, directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def make_tiny(name: str, directory: Path, **changes: Any) -> Path:
    """Save a tiny random model of architecture ``name``, with the figures of TINY or else those of ``models --check``; its
    weights are wide enough that tokens differ clearly."""
    figures = {**TINY.get(name, {}), **changes}
    kind = figures.pop("model_type", name)
    config = AutoConfig.for_model(kind, **figures) if name in TINY else tiny_config(name, **changes)
    return save_tiny(config, directory, seed=sum(name.encode()))
