"""Decode attention for GPUs: flash-decoding over the paged KV pool in Triton, which PyTorch's CUDA builds include.

Each request's context is divided into parts that different multiprocessors read at the same time (Dao et al.,
"Flash-Decoding", 2023); a second, small kernel combines them if there are several. Heads that share a K/V head are computed
together, so K and V are read once. No launch depends on values in the device's memory, so CUDA graphs can capture steps.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitwiser.machine.process import home_folder
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kernels.varlen_attention import VarlenAttention, find_varlen_problem

MAX_PARTS = 64  # of one request's context
PROGRAMS_PER_SM = 2  # contexts are divided until the device has this many programs per multiprocessor
MIN_ROWS = 16  # heads per program: the minimum of a matrix product on tensor cores
MAX_ROWS = 64
MAX_ROWS_FLOAT32 = 32  # float32 is multiplied without tensor cores, which takes more registers
TILE_BYTES = 16_384  # of K or V that a program reads at a time

Constants = dict[str, Any]  # a Triton function's compile-time constants and launch options, by name


class GpuDecodeAttention:
    """An :class:`~splitwiser.model.kernels.interface.AttentionKernel` for CUDA tensors and one new token per request."""

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
        bias: Tensor | None = None,
        bias_by_position: bool = False,
    ) -> Tensor:
        """See :meth:`splitwiser.model.kernels.interface.AttentionKernel.__call__`."""
        attend_part, join_parts = _kernels()
        query = query.contiguous()
        requests, heads, key_dim = query.shape
        _, block_tokens, kv_heads, value_dim = values.shape
        group = heads // kv_heads
        programs = kv_heads * -(-group // _rows(group, query.element_size()))  # per part of a request's context
        parts = _parts(requests * programs, query.device)
        attend, join = kernel_constants(
            heads, kv_heads, key_dim, value_dim, block_tokens, query.element_size(), parts,
            softcap is not None, sinks is not None, 0 if bias is None else bias.shape[1], bias_by_position,
        )  # fmt: skip
        output = partial = query.new_empty(requests, heads, value_dim)
        statistics: Sequence[Tensor | None] = (None, None)
        if parts > 1:
            partial = query.new_empty(requests, heads, parts, value_dim, dtype=torch.float32)
            statistics = query.new_empty(2, requests, heads, parts, dtype=torch.float32).unbind()
        attend_part[(requests, programs, parts)](
            query, keys, values, tables, tables.shape[1], starts, lengths, None if sinks is None else sinks.contiguous(),
            bias, partial, *statistics, scaling, softcap or 0.0, **attend,
        )  # fmt: skip
        if parts > 1:
            join_parts[(requests, heads)](partial, *statistics, output, **join)
        return output


@functools.cache
def kernel_constants(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, block_tokens: int, element_bytes: int, parts: int,
    capped: bool, has_sinks: bool, biases: int, bias_by_position: bool,
) -> tuple[Constants, Constants]:  # fmt: skip
    """Return the constants of ``attend_part`` and ``join_parts`` for tensors of these sizes; ``biases`` are the entries of
    the bias per head, 0 without one.

    ``ROWS``, ``TILE`` and ``num_warps`` are chosen such that no registers are spilled up to head size 256.
    """
    group = heads // kv_heads
    rows = _rows(group, element_bytes)
    key_pad, value_pad = max(16, _power_of_2(key_dim)), max(16, _power_of_2(value_dim))
    tile = min(64, max(16, TILE_BYTES // (max(key_pad, value_pad) * element_bytes)))
    in_float32 = element_bytes == 4
    attend = {
        "HEADS": heads, "KV_HEADS": kv_heads, "GROUP": group, "ROWS": rows, "KEY_DIM": key_dim, "KEY_PAD": key_pad,
        "VALUE_DIM": value_dim, "VALUE_PAD": value_pad, "BLOCK_TOKENS": block_tokens, "PARTS": parts,
        "TILE": 16 if in_float32 and rows > MIN_ROWS else tile, "CAPPED": capped, "SINKS": has_sinks,
        "BIASES": biases, "BIAS_BY_POSITION": bias_by_position,
        "num_warps": 8 if in_float32 or rows > 32 else 4, "num_stages": 3,
    }  # fmt: skip
    join = {
        "HEADS": heads, "VALUE_DIM": value_dim, "VALUE_PAD": value_pad, "PARTS": parts, "num_warps": 4, "num_stages": 1
    }  # fmt: skip
    return attend, join


def load_gpu_kernels(dtype: torch.dtype, layers: Sequence[LayerShape]) -> tuple[PoolKernels, dict[str, str]]:
    """Return the kernels of a GPU; see :func:`splitwiser.model.kernels.choose.load_kernels`."""
    varlen_problem = find_varlen_problem(dtype, layers)
    has_triton = importlib.util.find_spec("triton") is not None
    kernels = PoolKernels(
        decode=GpuDecodeAttention() if has_triton else None,
        varlen=None if varlen_problem else VarlenAttention(),
    )
    return kernels, {
        "prefill_attention": f"torch.nn.functional.scaled_dot_product_attention ({varlen_problem})"
        if varlen_problem
        else "torch.nn.attention.varlen, one call a layer",
        "decode_attention": "triton_decode.py, compiled by Triton"
        if has_triton
        else "plain PyTorch (Triton is not installed)",
    }


def cache_directory() -> Path:
    """Return Triton's folder of compiled kernels. Raises FileNotFoundError for a user without a home folder."""
    if given := os.environ.get("TRITON_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("TRITON_HOME") or home_folder("TRITON_CACHE_DIR")) / ".triton" / "cache"


def _rows(group: int, element_bytes: int) -> int:
    """Return the number of heads per program, of the ``group`` heads that share a K/V head."""
    return min(MAX_ROWS_FLOAT32 if element_bytes == 4 else MAX_ROWS, max(MIN_ROWS, _power_of_2(group)))


def _power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least ``number``."""
    return 1 << (number - 1).bit_length()


def _parts(programs: int, device: torch.device) -> int:
    """Return the number of parts per context, a power of 2, such that ``programs`` programs per part fill the device."""
    room = PROGRAMS_PER_SM * _multiprocessors(device) // programs
    return min(MAX_PARTS, 1 << max(0, room.bit_length() - 1))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """Return the two Triton functions; imported on first use, since a machine without a GPU need not have Triton."""
    from splitwiser.model.kernels import triton_decode

    return triton_decode.attend_part, triton_decode.join_parts
