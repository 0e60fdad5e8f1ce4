"""Tiny models with random weights that keep the structure of a large one: identity is proven on them in seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel

from splitwiser.model.checkpoints.configuration import without_bars
from splitwiser.model.checkpoints.weights import auto_class, tie_weights

VOCABULARY = 151
POSITIONS = 256
LAYERS = 3  # at least; more where layers are of more kinds, up to MOST_LAYERS
MOST_LAYERS = 6
_HEADS = 4
_HEAD_SIZE = 16
_ORIGINAL_POSITIONS = 64  # of rotary scaling, so that requests are shorter and longer
_FEED_FORWARD = 96

_HEAD_COUNTS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
    "encoder_attention_heads", "swa_num_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
)  # fmt: skip
# What stands in place of a figure, by the names that architectures have for it. None and 0 mean "without" and stay.
_TINY: dict[str, int] = {
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size", "ngram_vocab_size_base"),
        VOCABULARY,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length", "context_length",
         "max_target_positions"),
        POSITIONS,
    ),
    "original_max_position_embeddings": _ORIGINAL_POSITIONS,
    **dict.fromkeys(_HEAD_COUNTS, _HEADS),
    **dict.fromkeys(
        ("head_dim", "global_head_dim", "kv_channels", "attention_head_dim", "dim_head", "d_head", "swa_head_dim"),
        _HEAD_SIZE,
    ),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "emb_dim", "lru_width",
         "attention_hidden_size", "input_embedding_size", "output_embedding_size", "ple_embed_dim"),
        _HEADS * _HEAD_SIZE,
    ),
    **dict.fromkeys(
        ("n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "expert_ffn_hidden_size", "dff",
         "dim_ff", "d_inner"),
        _FEED_FORWARD,
    ),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "local_attention", "attention_window_size"), 9),
    **dict.fromkeys(("attention_chunk_size", "floor_scale"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "num_expert_group", "num_shared_experts", "n_shared_experts", "first_k_dense_replace",
         "num_dense_layers", "moe_num_shared_experts"),
        1,
    ),
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "qk_head_dim": 24,
    "v_head_dim": 12, "rotary_dim": 8, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "query_pre_attn_scalar": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads")
_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers",
    "num_encoder_layers",
)  # fmt: skip
_NOT_FIGURES = ("id2label", "label2id", "transformers_version", "architectures", "dtype", "model_type")

# Figures of architectures whose own defaults or whose relations between figures the above does not know.
_LIKE_BERT = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
_OWN_HEAD_SIZE = {"head_dim": _HEAD_SIZE}
_WITH_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_WITH_CONVOLUTIONS = {"num_hidden_layers": 3, "full_attn_idxs": None, "layer_types": ["conv", "full_attention", "conv"]}
FIGURES: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _LIKE_BERT},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 48]},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "bamba": _WITH_MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "per_layer_config": {}, "num_hidden_layers": 4,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": _WITH_MAMBA,
    "hunyuan_v1_dense": _OWN_HEAD_SIZE,
    "hunyuan_v1_moe": _OWN_HEAD_SIZE,
    "lfm2": _WITH_CONVOLUTIONS,
    "lfm2_moe": _WITH_CONVOLUTIONS,
    "mamba2": {"head_dim": 32},
    "marian": {"decoder_start_token_id": 0},
    "ministral": _OWN_HEAD_SIZE,
    "nemotron": {"num_key_value_heads": 2},
    "t5": {"decoder_start_token_id": 0},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:  # noqa: ANN401  # figures of any type
    """Return the tiny configuration of the architecture ``name``, a ``model_type`` of transformers."""
    return shrink(CONFIG_MAPPING[name](), **{**FIGURES.get(name, {}), **changes})


def shrink(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:  # noqa: ANN401  # figures of any type
    """Return ``config`` with tiny figures and the same structure: kinds of layers, and whether heads share K and V.
    ``changes`` replace what would be chosen."""
    given = {name: value for name, value in config.to_dict().items() if name not in _NOT_FIGURES}
    layers = getattr(config, "num_hidden_layers", 0)
    kept = _kept_layers(given, layers)
    figures = {name: _figure(name, value, given, kept, layers) for name, value in given.items()}
    for name in getattr(config, "sub_configs", {}):
        if isinstance(sub := getattr(config, name, None), PreTrainedConfig):
            figures[name] = shrink(sub, **FIGURES.get(sub.model_type, {}))
    return type(config)(**{**figures, **changes})


def _figure(name: str, value: Any, given: Mapping[str, Any], kept: list[int], layers: int) -> Any:  # noqa: ANN401
    """Return what stands for the figure ``name`` of the configuration ``given``, which has the value ``value``."""
    if not value or isinstance(value, bool):
        return value
    if name in _LAYER_COUNTS:
        return len(kept)
    if name == "num_kv_shared_layers":
        return sum(layer >= layers - value for layer in kept)
    if name in _KV_HEADS:
        heads = next((given[each] for each in _HEAD_COUNTS if each in given), None)
        return 1 if value == 1 else _HEADS if value == heads else _HEADS // 2
    if name == "head_dim" and value == given.get("qk_rope_head_dim"):
        return _TINY["qk_rope_head_dim"]
    if isinstance(value, list) and len(value) == layers:
        value = [value[layer] for layer in kept]
        return [_FEED_FORWARD] * len(kept) if "intermediate_size" in name else value
    if name == "per_layer_config":
        return {key: value[layer] for key, layer in enumerate(kept) if layer in value}
    if "rope" in name and isinstance(value, dict):
        return _rope(value)
    if "intermediate_size" in name and isinstance(value, int):
        return _FEED_FORWARD
    if name == "eos_token_id" or isinstance(value, int):
        return _TINY.get(name, value)
    return value


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters, or those of each type of layer, with factors for a tiny head."""
    tiny = dict(parameters)
    for name, value in parameters.items():
        if isinstance(value, dict):
            tiny[name] = _rope(value)
        elif name == "original_max_position_embeddings" and value:
            tiny[name] = _ORIGINAL_POSITIONS
        elif name in ("short_factor", "long_factor"):
            tiny[name] = value[: _HEAD_SIZE // 2]
    return tiny


def _kept_layers(figures: Mapping[str, Any], layers: int) -> list[int]:
    """Return the layers to keep of ``layers``: the first of each kind, as lists of a figure per layer tell them apart, and
    the first others up to :data:`LAYERS`."""
    lists = [value for value in figures.values() if isinstance(value, list) and len(value) == layers]
    sharing = layers - (figures.get("num_kv_shared_layers") or 0)
    kinds = [str([layer >= sharing, *(value[layer] for value in lists)]) for layer in range(layers)]
    first = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
    others = [layer for layer in range(layers) if layer not in first]
    return sorted([*first, *others[: max(0, LAYERS - len(first))]])


def save_tiny(config: PreTrainedConfig, directory: Path, seed: int = 0) -> Path:
    """Save a model of ``config`` with random weights, drawn wide enough that tokens differ clearly."""
    torch.manual_seed(seed)
    module: PreTrainedModel = auto_class(config).from_config(config)
    tie_weights(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                wide = 1.0 if "relative_attention_bias" in name else 0.2
                parameter.normal_(0, 0.06 if name.endswith("Attention.q.weight") else wide)  # T5 scales no scores
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    module.generation_config = GenerationConfig(
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
    )
    with without_bars():
        module.save_pretrained(directory)
    return directory
