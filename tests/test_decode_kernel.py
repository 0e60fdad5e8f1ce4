"""The kernel is chosen as asked for."""

from pathlib import Path

import pytest
import torch

from splitwiser.decode_kernel import load_kernel
from splitwiser.errors import InputError

CPU = torch.device("cpu")


def test_without_a_compiler_plain_pytorch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_kernel("auto", CPU) == (None, "plain PyTorch (no g++ on PATH)")


def test_plain_is_plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_kernel("plain", CPU) == (None, "plain PyTorch (as asked for)")
    assert not list(tmp_path.iterdir())


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(InputError, match="unknown kernels 'fast'; known: auto, plain"):
        load_kernel("fast", CPU)
