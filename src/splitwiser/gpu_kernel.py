"""Decode attention for GPUs: flash-decoding over the block pool in Triton, which PyTorch's CUDA builds bring along.

Each request's context is cut into parts that different multiprocessors read at the same time (Dao et al., "Flash-Decoding",
2023); a second, small kernel joins the parts. The heads that share a K/V head are taken together, so K and V are read
once. Nothing depends on a length that only the device knows, so steps can be captured in CUDA graphs.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitwiser import packed_attention
from splitwiser.kv_pool import LayerShape
from splitwiser.pool_kernels import PoolKernels

PARTS = 16  # most parts of one request's context
PROGRAMS_PER_SM = 2  # parts are made until the device has about this many programs a multiprocessor
LEAST_ROWS = 16  # what a matrix product on tensor cores takes


class GpuKernel:
    """A :class:`~splitwiser.pool_kernels.AttentionKernel` for CUDA tensors."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        starts: Tensor,
        offsets: Tensor,
        lengths: Tensor,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`splitwiser.pool_kernels.AttentionKernel.__call__`; for one token a request only."""
        attend_part, join_parts = _kernels()
        query = query.contiguous()
        requests, heads, key_dim = query.shape
        _, block_tokens, kv_heads, value_dim = values.shape
        group = heads // kv_heads
        parts = _parts(requests * kv_heads, query.device)
        partial = query.new_empty(requests, heads, parts, value_dim, dtype=torch.float32)
        statistics = query.new_empty(2, requests, heads, parts, dtype=torch.float32)
        output = query.new_empty(requests, heads, value_dim)
        attend_part[(requests, kv_heads, parts)](
            query, keys, values, tables, starts, lengths, partial, statistics[0], statistics[1], scaling, softcap or 0.0,
            HEADS=heads, KV_HEADS=kv_heads, GROUP=group, ROWS=max(LEAST_ROWS, _power_of_2(group)), KEY_DIM=key_dim,
            KEY_PAD=max(16, _power_of_2(key_dim)), VALUE_DIM=value_dim, VALUE_PAD=max(16, _power_of_2(value_dim)),
            BLOCK_TOKENS=block_tokens, WIDTH=tables.shape[1], PARTS=parts,
            TILE=32 if max(key_dim, value_dim) * query.element_size() > 256 else 64, CAPPED=softcap is not None,
        )  # fmt: skip
        join_parts[(requests, heads)](
            partial, statistics[0], statistics[1], output, query if sinks is None else sinks.contiguous(),
            HEADS=heads, VALUE_DIM=value_dim, VALUE_PAD=_power_of_2(value_dim), PARTS=parts,
            PARTS_PAD=_power_of_2(parts), SINKS=sinks is not None,
        )  # fmt: skip
        return output


def load_gpu_kernels(dtype: torch.dtype, layers: Sequence[LayerShape]) -> tuple[PoolKernels, dict[str, str]]:
    """See :func:`splitwiser.kernel_choice.load_kernels`."""
    not_packed = packed_attention.find_problem(dtype, layers)
    has_triton = importlib.util.find_spec("triton") is not None
    kernels = PoolKernels(
        decode=GpuKernel() if has_triton else None,
        packed=None if not_packed else packed_attention.PackedAttention(),
    )
    return kernels, {
        "prefill_attention": f"torch.nn.functional.scaled_dot_product_attention ({not_packed})"
        if not_packed
        else "torch.nn.attention.varlen, one call a layer",
        "decode_attention": "gpu_kernel.py, compiled by Triton"
        if has_triton
        else "plain PyTorch (Triton is not installed)",
    }


def cache_directory() -> Path:
    """Where Triton keeps what it has compiled."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def _power_of_2(number: int) -> int:
    """The least power of 2 that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def _parts(rows: int, device: torch.device) -> int:
    """Parts of each request's context, so that ``rows`` requests times K/V heads fill the device."""
    return max(1, min(PARTS, -(-PROGRAMS_PER_SM * _multiprocessors(device) // rows)))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """The two Triton functions; made on first use, since Triton is not there on a machine without a GPU."""
    from splitwiser.kernels import decode_attention

    return decode_attention.attend_part, decode_attention.join_parts
