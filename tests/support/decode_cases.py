"""Decode steps on which to compare the Triton kernel with float64; as a program, prints the largest error of each.

Triton's interpreter (TRITON_INTERPRET=1) must be chosen before Triton is imported, so it needs a process of its own.
"""

import json
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from splitwiser.model.attention import AttentionOptions, attend
from splitwiser.model.kernels import gpu_attention as gpu_kernel


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_tokens: int
    parts: int
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    table_dtype: torch.dtype = torch.int64
    softcap: float | None = None
    has_sinks: bool = False
    biases: int = 0
    bias_by_position: bool = False


SHORT, WINDOWS = (1, 16, 17, 100, 130), (0, 3, 0, 91, 2)
NO_WINDOWS = (0,) * len(SHORT)
HALF, INT32 = torch.float16, torch.int32
CASES = {
    "one part": Case(4, 4, 12, 12, 16, 1, SHORT, NO_WINDOWS),
    "one part with sinks": Case(4, 2, 64, 64, 16, 1, SHORT, WINDOWS, HALF, INT32, has_sinks=True),
    "one part with all options": Case(4, 2, 256, 256, 5, 1, SHORT, WINDOWS, torch.float32, INT32, 5.0, True),
    "one part with a bias": Case(4, 2, 64, 64, 16, 1, SHORT, WINDOWS, HALF, INT32, 5.0, True, 40),
    "many parts with a bias by position": Case(6, 2, 64, 64, 5, 4, SHORT, WINDOWS, biases=90, bias_by_position=True),
    "two parts": Case(6, 2, 64, 64, 5, 2, SHORT, WINDOWS, torch.float32, INT32, 5.0),
    "blocks of one token": Case(6, 1, 128, 96, 1, 4, SHORT, WINDOWS, has_sinks=True),
    "many parts": Case(2, 2, 64, 64, 16, 16, (1100, 7), (0, 0), HALF, INT32, 5.0, True),
    "most parts": Case(4, 1, 80, 80, 16, 64, (1999,), (0,), torch.float32, INT32, None, True),
    "most parts in a window": Case(4, 1, 80, 80, 16, 64, (1999,), (1700,), HALF),
    "programs that share a K/V head": Case(71, 1, 64, 64, 16, 2, (70,), (2,), softcap=5.0, has_sinks=True),
    "largest group": Case(128, 1, 16, 16, 16, 2, (70,), (2,), HALF, INT32),
    "largest head": Case(2, 1, 576, 512, 16, 1, (1, 70), (0, 2)),
}


def largest_error(case: Case, device: torch.device) -> float:
    """Of the kernel against float64; in the pool, all that the requests may not see is not a number."""
    torch.manual_seed(0)
    requests, width = len(case.lengths), -(-max(case.lengths) // case.block_tokens) + 1
    tables = 1 + torch.randperm(requests * width).view(requests, width)
    keys, values = (
        torch.full((1 + requests * width, case.block_tokens, case.kv_heads, size), torch.nan, dtype=case.dtype)
        for size in (case.key_dim, case.value_dim)
    )
    query = torch.randn(requests, case.heads, case.key_dim).to(case.dtype)
    sinks = torch.randn(case.heads).to(case.dtype) if case.has_sinks else None
    bias = torch.randn(case.heads, case.biases) if case.biases else None
    options = AttentionOptions(
        0.3, case.softcap, None if sinks is None else sinks.double(), bias, case.bias_by_position
    )
    expected: list[Tensor] = []
    for row, (start, length) in enumerate(zip(case.starts, case.lengths, strict=True)):
        positions = torch.arange(start, length)
        places = tables[row][positions // case.block_tokens], positions % case.block_tokens
        for pool in (keys, values):
            pool[places] = torch.randn(length - start, *pool.shape[2:]).to(case.dtype)
        k, v = (pool[places].double().transpose(0, 1)[None] for pool in (keys, values))
        seen = torch.ones(1, 1, 1, length - start, dtype=torch.bool)
        own = torch.full((1, 1, 1), length - 1)
        made = attend(query[row, :, None][None].double(), k, v, seen, options, (own, positions[None, None]))
        expected.append(made[0, :, 0])
    with patch.object(gpu_kernel, "_parts", return_value=case.parts):
        made = gpu_kernel.GpuDecodeAttention()(
            query.to(device), keys.to(device), values.to(device), tables.to(device, case.table_dtype),
            torch.tensor(case.starts, device=device), torch.arange(requests + 1, device=device),
            torch.tensor(case.lengths, device=device), 0.3, case.softcap, None if sinks is None else sinks.to(device),
            None if bias is None else bias.to(device), case.bias_by_position,
        )  # fmt: skip
    return (made.cpu().double() - torch.stack(expected)).abs().max().item()


def error_beyond_32_bits(device: torch.device) -> float:
    """The error where the one token seen lies behind 2**31 elements of the pool, all else of which is never touched."""
    blocks, block_tokens, size = 2**17 + 1, 2**10, 16
    pool = torch.empty(blocks, block_tokens, 1, size, dtype=HALF, device=device)
    pool[-1, 0] = 1.0
    one = torch.ones(1, dtype=torch.int64, device=device)
    with patch.object(gpu_kernel, "_parts", return_value=1):
        made = gpu_kernel.GpuDecodeAttention()(
            torch.ones(1, 1, size, dtype=HALF, device=device), pool, pool,
            torch.tensor([[blocks - 1]], dtype=INT32, device=device), one - 1, torch.arange(2, device=device), one, 0.3,
        )  # fmt: skip
    return (made - 1.0).abs().max().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    errors = {name: largest_error(case, cpu) for name, case in CASES.items()}
    print(json.dumps({**errors, "beyond 32 bits": error_beyond_32_bits(cpu)}))
