"""Checkpoints that cannot be loaded, refused in one line by a run and by the doctor alike; and their generation settings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedConfig

from splitwiser import LLM
from splitwiser.doctor.config import DoctorConfig
from splitwiser.doctor.needs import find_needs
from splitwiser.model.checkpoints.catalog import resolve_model
from splitwiser.model.checkpoints.checkpoint import (
    describe_own_sampling,
    find_eos_problem,
    find_weights_problem,
    own_sampling,
    unapplied_settings,
)
from splitwiser.model.checkpoints.configuration import DTYPES
from splitwiser.model.loading import load_model
from tests.support.assertions import assert_says, refusal

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: Callable[[str], Path]) -> Path:
    return Path(shutil.copytree(tiny("opt"), tmp_path / "m"))


def refused(directory: Path, **settings: Any) -> str:
    """The line with which a run refuses the checkpoint, as the doctor does."""
    line = refusal(load_model, directory, **{"dtype": "float32", "device": "cpu", "load_format": "auto", **settings})
    needs = find_needs(DoctorConfig(model=str(directory), device="cpu", **settings), torch.device("cpu"), 10**12, None)
    assert needs.problem == line
    return line


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_pointer_of_git_lfs_is_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(POINTER)
    assert_says(refused(checkpoint), f"{checkpoint}/model.safetensors: a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_weights_that_are_cut_short_are_named(keep: int, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_says(refused(checkpoint), f"{path}: cannot be opened as safetensors, or is truncated")


@pytest.mark.parametrize("content", [b"", POINTER, b"PK\x03\x04 cut"])
def test_a_pickle_that_is_none_is_named(content: bytes, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(content)
    assert_says(refused(checkpoint), f"{checkpoint}/pytorch_model.bin: ")


def test_a_checkpoint_of_pytorchs_own_has_no_problem(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    assert find_weights_problem(resolve_model(checkpoint)) is None


@pytest.mark.parametrize("index", [{}, {"weight_map": {"a": "part.safetensors"}}, {"weight_map": []}])
def test_an_index_that_leads_nowhere_is_named(index: dict[str, Any], checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert_says(refused(checkpoint), str(path))


def test_weights_that_the_file_lacks_are_not_drawn_at_random(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    lacking = next(name for name in weights if "fc1.weight" in name)
    save_file({name: weight for name, weight in weights.items() if name != lacking}, path, {"format": "pt"})
    assert_says(refusal(LLM, checkpoint), f"{checkpoint} lacks 1 of the model's weights, such as", "fc1.weight")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "rot13"])
def test_a_quantisation_that_cannot_be_loaded_is_named(method: str, checkpoint: Path) -> None:
    change_config(checkpoint, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    assert_says(refused(checkpoint), f"its weights are quantised ({method}), which cannot be loaded here: ")


def test_a_type_that_is_not_served_is_named(checkpoint: Path) -> None:
    change_config(checkpoint, dtype="float64")
    assert_says(refused(checkpoint, dtype="auto"), "torch.float64, which is not served; give one of float32")


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": "many"}, {"num_attention_heads": 0}, {"dtype": "float99"}, {"hidden_size": None}],
    ids=str,
)
def test_a_configuration_that_makes_no_model_is_refused(changes: dict[str, Any], checkpoint: Path) -> None:
    change_config(checkpoint, **changes)
    assert_says(refused(checkpoint), "model m: ")


@pytest.mark.parametrize("content", ["[1]", "5"])
def test_generation_settings_of_another_form_are_named(content: str, checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text(content)
    assert_says(refused(checkpoint), f"{checkpoint}/generation_config.json: invalid generation settings")


@pytest.mark.parametrize("given", ["a", [1, "b"], 2.5])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_of_sequence_that_is_no_token_id_is_named(name: str, given: object, checkpoint: Path) -> None:
    path = checkpoint / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": given}))
    assert_says(refused(checkpoint), "eos_token_id", str(given))


def test_end_of_sequence_tokens_of_a_configuration_without_that_field() -> None:
    # transformers checks those of configurations that declare it
    config = PreTrainedConfig()
    for right in (None, 3, [3, 4]):
        config.eos_token_id = right
        assert find_eos_problem(config) is None
    config.eos_token_id = "</s>"
    assert find_eos_problem(config) == "eos_token_id must be a token id or a list of them, not '</s>'"


def test_weights_that_run_in_a_wider_type_than_theirs_are_noted(checkpoint: Path) -> None:
    change_config(checkpoint, dtype="bfloat16")
    notes = {dtype: load_model(checkpoint, dtype=dtype, device="cpu", load_format="auto").notes for dtype in DTYPES}
    assert notes["float32"] == [
        "the weights are stored as bfloat16 and run as float32, which takes 2 times the memory; dtype auto keeps their own"
    ]
    assert notes["bfloat16"] == notes["float16"] == []
    assert load_model(checkpoint, dtype="float32", device="cpu", load_format="dummy").notes[:1] != notes["float32"]


def test_a_folder_without_weights_is_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert refused(checkpoint) == f"model m: no weights in {checkpoint}"


def test_a_tokenizer_that_cannot_be_loaded_is_noted(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_bytes(POINTER)
    with LLM(checkpoint) as llm:
        (note,) = llm.model.notes
        assert_says(note, "m's tokenizer cannot be loaded: ", f"{checkpoint}/tokenizer.json: a Git LFS pointer")
        assert refusal(llm.generate, "text") == f"request 0: {note}"


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.0, "eos_token_id": 2}, {}),
        ({"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.1}),
        (
            {"do_sample": True, "temperature": 0.7, "min_p": 0.05},
            {"temperature": 0.7, "top_k": 50, "top_p": 1.0, "min_p": 0.05},  # 50 is transformers' own default
        ),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    ],
)
def test_own_sampling_is_what_generate_would_do(settings: dict[str, Any], own: dict[str, Any]) -> None:
    assert own_sampling(GenerationConfig(**settings)) == own


def test_settings_that_no_mode_applies_are_named() -> None:
    settings = GenerationConfig(repetition_penalty=1.2, do_sample=True, suppress_tokens=[5], no_repeat_ngram_size=3)
    (note,) = unapplied_settings(settings)
    assert note.endswith("not applied, in any mode: no_repeat_ngram_size=3, suppress_tokens=[5]")
    assert unapplied_settings(GenerationConfig(repetition_penalty=1.2)) == []


def test_a_model_without_settings_says_nothing() -> None:
    assert (own_sampling(None), unapplied_settings(None), describe_own_sampling({}, "none")) == ({}, [], [])
