"""Tiny models keep the structure of large ones."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from splitwiser.model.loading import load_model
from splitwiser.model.tiny import POSITIONS, VOCABULARY, save_tiny, shrink, tiny_config


@pytest.mark.parametrize(("heads", "kv_heads", "kept"), [(32, 32, 4), (32, 8, 2), (64, 1, 1)])
def test_heads_share_as_they_did(heads: int, kv_heads: int, kept: int) -> None:
    config = AutoConfig.for_model("llama", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=64)
    tiny = shrink(config)
    assert (tiny.num_attention_heads, tiny.num_key_value_heads) == (4, kept)


def test_figures_are_tiny() -> None:
    tiny = tiny_config("qwen3_moe")
    assert (tiny.vocab_size, tiny.max_position_embeddings) == (VOCABULARY, POSITIONS)
    assert (tiny.num_hidden_layers, tiny.num_experts, tiny.num_experts_per_tok) == (3, 4, 2)


def test_a_layer_of_each_kind_is_kept() -> None:
    tiny = tiny_config("gemma3_text")  # of 26, each sixth sees all tokens
    assert tiny.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_layers_that_share_are_kept_beside_those_that_they_share_with() -> None:
    tiny = tiny_config("gemma3n_text")
    shared = tiny.layer_types[-tiny.num_kv_shared_layers :]
    assert set(shared) == set(tiny.layer_types[: -tiny.num_kv_shared_layers]) == {"sliding_attention", "full_attention"}


def test_what_a_model_does_without_stays_away() -> None:
    assert tiny_config("qwen2").sliding_window is None
    assert tiny_config("mistral").sliding_window == 9


def test_rotary_factors_fit_a_tiny_head() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
    }  # fmt: skip
    tiny = shrink(AutoConfig.for_model("phi3", rope_parameters=rope, original_max_position_embeddings=4096))
    assert [len(tiny.rope_parameters[name]) for name in ("short_factor", "long_factor")] == [8, 8]
    assert tiny.rope_parameters["original_max_position_embeddings"] == 64


def test_changes_come_last() -> None:
    assert tiny_config("llama", sliding_window=5, num_hidden_layers=2).num_hidden_layers == 2


def test_dummy_weights_that_a_models_initialisation_leaves_out_are_drawn(tmp_path: Path) -> None:
    save_tiny(tiny_config("openai-gpt"), tmp_path)
    module = load_model(tmp_path, dtype="float32", device="cpu", load_format="dummy").module
    assert [name for name, parameter in module.named_parameters() if parameter.ndim > 1 and not parameter.any()] == []
