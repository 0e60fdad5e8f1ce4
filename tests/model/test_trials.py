"""What trials found is remembered for the same model alone."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splitwiser.errors import UnsupportedModelError
from splitwiser.model import attach, compatibility, trials
from splitwiser.model.compatibility import attach_engine, padding_changes_tokens
from splitwiser.model.forward import forward
from splitwiser.model.fusing import _Recorder, describe_parts
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.model.trials import remembered_flag
from tests.support.models import make_tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trials, "cache_directory", lambda: tmp_path)
    return tmp_path / "trials"


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each comparison of logits."""
    calls: list[str] = []
    own = compatibility._own_logits

    def counted(model: LoadedModel, *arguments: object) -> torch.Tensor:
        calls.append(model.name)
        return own(model, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compatibility, "_own_logits", counted)
    return calls


def load(directory: Path, dtype: str = "bfloat16") -> LoadedModel:
    return load_model(directory, dtype=dtype, device="cpu", load_format="auto")


def attached(directory: Path, dtype: str = "bfloat16") -> LoadedModel:
    model = load(directory, dtype)
    attach_engine(model, pack=dtype == "bfloat16", remember=True)
    return model


def logits_of(model: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        return forward(model.module, _Recorder(), [5, 6, 7], range(3), [2])


@pytest.mark.parametrize("name", ["opt", "llama", "qwen3", "gemma2"])
def test_the_second_load_tries_nothing_and_makes_the_same_model(
    name: str, tiny: Callable[[str], Path], tried: list[str]
) -> None:
    first = attached(tiny(name))
    assert tried
    tried.clear()
    second = attached(tiny(name))
    assert not tried
    assert describe_parts(first.module) == describe_parts(second.module)
    assert torch.equal(logits_of(first), logits_of(second))


def change_a_time(directory: Path, _: pytest.MonkeyPatch) -> None:
    os.utime(directory / "model.safetensors")


def change_weights(directory: Path, _: pytest.MonkeyPatch) -> None:
    make_tiny("llama", directory)


def change_threads(_: Path, __: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)


def change_a_setting(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")


def change_the_version(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "git_version", "another")


def change_the_processor(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_processor", lambda: ["flags: sse2"])


def change_the_code(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: own(self, x))  # type: ignore[no-untyped-call]


CHANGES = (
    change_a_time, change_weights, change_threads, change_a_setting, change_the_version, change_the_processor,
    change_the_code,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_key_is_tried_again(
    change: Callable[[Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    tried: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = make_tiny("llama", tmp_path / "model")
    attached(directory)
    tried.clear()
    before = torch.get_num_threads()
    try:
        change(directory, monkeypatch)
        attached(directory)
    finally:
        torch.set_num_threads(before)
    assert tried


def test_another_dtype_and_another_seed_are_other_models(tiny: Callable[[str], Path], tried: list[str]) -> None:
    attached(tiny("opt"))
    for other in (load(tiny("opt"), "float32"), *(load_dummy(tiny("opt"), seed) for seed in (0, 1))):
        tried.clear()
        attach_engine(other, remember=True)
        assert tried


def load_dummy(directory: Path, seed: int) -> LoadedModel:
    return load_model(directory, dtype="float32", device="cpu", load_format="dummy", seed=seed)


@pytest.mark.parametrize("harm", [b"", b"nonsense", b"\xff\xfe", b"0\n{}", None])
def test_a_broken_file_counts_as_none(
    harm: bytes | None, tiny: Callable[[str], Path], tried: list[str], cache: Path
) -> None:
    fused = describe_parts(attached(tiny("opt")).module)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes().replace(b"null", b"   0") + b" " if harm is None else harm)
    tried.clear()
    assert describe_parts(attached(tiny("opt")).module) == fused
    assert tried
    tried.clear()
    attached(tiny("opt"))
    assert not tried


def test_a_cache_that_cannot_be_used_means_trying_each_time(
    tiny: Callable[[str], Path], tried: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(trials, "cache_directory", lambda: tmp_path / "file")
    for _ in range(2):
        tried.clear()
        attached(tiny("opt"), "float32")
        assert tried


def test_a_refused_model_is_tried_again_and_stays_refused(
    tiny: Callable[[str], Path], tried: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(attach, "agree", lambda *_: False)
        for _ in range(2):
            tried.clear()
            with pytest.raises(UnsupportedModelError, match="do not give the same logits"):
                attached(tiny("opt"))
            assert tried
    assert not list(cache.glob("*"))
    attached(tiny("opt"))


def test_whether_padding_changes_tokens_is_remembered(tiny: Callable[[str], Path]) -> None:
    found = remembered_flag(load(tiny("opt"), "float32"), "padding", padding_changes_tokens)
    assert remembered_flag(load(tiny("opt"), "float32"), "padding", lambda _: not found) == found
    assert remembered_flag(load(tiny("opt"), "float32"), "another", lambda _: not found) != found


def test_only_the_newest_outcomes_are_kept(
    tiny: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "KEPT", 2)
    for seed in range(4):
        remembered_flag(load_dummy(tiny("opt"), seed), "padding", lambda _: True)
    assert len(list(cache.iterdir())) == 2
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
