"""What whole test modules need: tiny random models, saved once a test session as checkpoints, and a stand-in for a GPU."""

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

# before torch is loaded: test files run side by side, and their threads and their processes' must not spin at each other
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from stand_in.build import StandIn, build, find_problem
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

torch.set_num_threads(1)  # for models this small, more threads only wait for each other

VOCABULARY = 151
POSITIONS = 256

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
    "llama4_text": {**_ROTARY, "head_dim": 12, "intermediate_size_mlp": 96, "num_local_experts": 2,
                    "no_rope_layers": [1, 0, 1], "attention_chunk_size": 256, "floor_scale": 16, "attn_scale": 0.5},
    "gptj": {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": POSITIONS},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--setup", action="store_true", help="also build an environment in a clean clone (minutes)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {"setup": None if config.getoption("--setup") else "builds an environment; run with --setup",
               "stand_in": find_problem(),
               "gpu": None if torch.cuda.is_available() else "needs a CUDA device, and there is none"}  # fmt: skip
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    # the longest first, so that files which run side by side end together
    items.sort(key=lambda item: item.get_closest_marker("setup") is None)


@pytest.fixture(scope="session")
def on_stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """Runs a command on a stand-in for a GPU; for tests marked ``stand_in``."""
    libraries = tmp_path_factory.mktemp("stand_in")
    build(libraries)
    return StandIn(libraries, tmp_path_factory.mktemp("on_stand_in"))


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """This user has neither HOME nor an entry in passwd, as user ids of containers."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def make_tiny(name: str, directory: Path, **changes: Any) -> Path:
    """Save a tiny random model of architecture ``name``; its weights are wide enough that tokens differ clearly."""
    figures = {**TINY[name], **changes}
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **figures))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, bos_token_id=1)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint directory of a tiny random model by architecture, made on first use."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp("tiny") / f"tiny-{name}")
        return made[name]

    return get
