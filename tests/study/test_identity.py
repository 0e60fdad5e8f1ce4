"""The proof of a model's tokens on a tiny one, a sample of the architectures in the documentation, and their record."""

from pathlib import Path

import check_architectures
import pytest
from transformers import AutoConfig

from splitwiser.errors import InputError
from splitwiser.model.tiny import tiny_config
from splitwiser.study.identity import RUNS, find_config, prove
from tests.support.commands import invoke

IN_ONE_PROCESS = [name for name, settings in RUNS.items() if settings["mode"] == "sequential"]
# layers that share K and V (of one shape, and of two), latents, and experts beside attention that skips rotation
SAMPLE = ["gemma3n_text", "gemma4_text", "deepseek_v2", "cohere2_moe"]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_architectures_gives_the_tokens_of_generate(name: str) -> None:
    proof = prove(tiny_config(name), IN_ONE_PROCESS)
    assert (proof.shown, proof.problem, proof.half_problem) == (tuple(IN_ONE_PROCESS), "", "")


def test_an_architecture_that_is_refused_is_no_proof() -> None:
    proof = prove(tiny_config("mamba"))
    assert (proof.class_name, proof.shown) == ("MambaForCausalLM", ())
    assert "keeps a recurrent state" in proof.problem


def test_tokens_that_differ_are_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitwiser.engine.sampling.sample_tokens", lambda logits, *_: logits.argmin(dim=-1))
    proof = prove(tiny_config("llama"), ["packed"])
    assert proof.shown == ()
    assert proof.problem.startswith("packed: of a prompt of 1 tokens, new token 1 is ")


@pytest.mark.slow
def test_the_command_shows_what_was_proven_in_all_modes() -> None:
    done = invoke("models", "--check", "llama-3.2-1b")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert rows["model"].strip() == "llama-3.2-1b: LlamaForCausalLM, shrunk to 3 layers"
    assert [name for name in RUNS if rows[name].strip().endswith("those of generate")] == list(RUNS)


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("mamba", 1, "mamba: MambaForCausalLM, shrunk to 3 layers: MambaForCausalLM keeps a recurrent state"),
        ("qwen33", 2, "unknown model or architecture 'qwen33'; did you mean qwen3"),
    ],
)
def test_the_command_fails_with_the_reason(name: str, code: int, said: str) -> None:
    done = invoke("models", "--check", name)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


def test_a_checkpoint_is_shrunk_to_its_own_structure(tmp_path: Path) -> None:
    given = {"num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 128, "tie_word_embeddings": True}
    AutoConfig.for_model("mistral", **given).save_pretrained(tmp_path)
    config = find_config(tmp_path)
    assert (config.model_type, config.num_attention_heads, config.num_key_value_heads) == ("mistral", 4, 2)
    assert (config.sliding_window, config.tie_word_embeddings) == (9, True)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(InputError, match="unknown model or architecture 'nothing-like-it'"):
        find_config("nothing-like-it")


def test_the_record_shows_seventy_architectures_in_all_runs() -> None:
    rows = check_architectures.read_record()
    served = {name: row for name, row in rows.items() if not row["problem"]}
    assert len({row["class"] for row in served.values()}) >= 70
    assert {row["shown"] for row in served.values()} == {", ".join(RUNS)}
    assert [name for name, row in served.items() if row["bfloat16"] != "yes"] == []
    assert [name for name in SAMPLE if name not in served] == []
