"""The Triton decode attention against the written-out one; how it cuts a context into parts changes nothing."""

import pytest
import torch

from splitwiser import gpu_kernel
from splitwiser.attention import AttentionOptions, attend
from splitwiser.gpu_kernel import GpuKernel, load_gpu_kernels
from splitwiser.pool_kernels import PoolKernels

BLOCK, BLOCKS, WIDTH = 16, 40, 9
LENGTHS, STARTS = [1, 16, 17, 100, 130], [0, 3, 0, 91, 2]


def test_without_triton_plain_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    kernels, described = load_gpu_kernels(torch.float32, [])
    assert kernels == PoolKernels()
    assert described["decode_attention"] == "plain PyTorch (Triton is not installed)"


@pytest.mark.parametrize(("rows", "parts"), [(1, 16), (12, 16), (64 * 8, 1), (16, 16), (30, 9)])
def test_parts_fill_the_device_and_no_more(rows: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernel, "_multiprocessors", lambda _: 132)
    assert gpu_kernel._parts(rows, torch.device("cpu")) == parts


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"), [(4, 4, 12, 12), (8, 2, 64, 64), (6, 1, 128, 96)]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_attends_as_written_out(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, bound: float,
    softcap: float | None, has_sinks: bool, parts: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_kernel, "_parts", lambda *_: parts)
    torch.manual_seed(0)
    cuda = torch.device("cuda")
    keys = torch.randn(BLOCKS, BLOCK, kv_heads, key_dim, device=cuda).to(dtype)
    values = torch.randn(BLOCKS, BLOCK, kv_heads, value_dim, device=cuda).to(dtype)
    query = torch.randn(len(LENGTHS), heads, key_dim, device=cuda).to(dtype)
    tables = torch.randperm(BLOCKS, device=cuda).repeat(2)[: len(LENGTHS) * WIDTH].view(len(LENGTHS), WIDTH)
    sinks = torch.randn(heads, device=cuda) if has_sinks else None
    starts, lengths = torch.tensor(STARTS, device=cuda), torch.tensor(LENGTHS, device=cuda)
    made = GpuKernel()(
        query, keys, values, tables, starts, torch.arange(len(LENGTHS) + 1, device=cuda), lengths, 0.3, softcap, sinks
    )
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        k, v = (kept[tables[row]].flatten(0, 1)[start:length].transpose(0, 1)[None].float() for kept in (keys, values))
        seen = torch.ones(1, 1, 1, length - start, dtype=torch.bool, device=cuda)
        expected = attend(query[row, :, None][None].float(), k, v, seen, AttentionOptions(0.3, softcap, sinks))
        torch.testing.assert_close(made[row].float(), expected[0, :, 0], atol=bound, rtol=bound)
