"""Kernels are chosen as asked for and as can be had, and the run's record says which and why."""

from pathlib import Path

import pytest
import torch

from splitwiser.model.kernels.choose import load_kernels
from splitwiser.model.kernels.interface import LayerShape, PoolKernels

CPU = torch.device("cpu")
LAYERS = [LayerShape(2, 64, 64)]


def test_without_a_compiler_plain_pytorch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels, described = load_kernels("auto", CPU, torch.bfloat16, LAYERS)
    assert kernels == PoolKernels()
    assert described["decode_attention"] == "plain PyTorch (no g++ on PATH)"


def test_plain_is_plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels, described = load_kernels("plain", CPU, torch.bfloat16, LAYERS)
    assert kernels == PoolKernels()
    assert set(described.values()) == {"plain PyTorch (as asked for)"}
    assert not list(tmp_path.iterdir())
