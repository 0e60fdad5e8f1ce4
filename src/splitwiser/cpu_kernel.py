"""The compiled decode attention for CPUs."""

import ctypes

import torch
from torch import Tensor

from splitwiser.native import load_native

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CpuKernel:
    """The function of ``kernels/decode_attention.cpp``, called through ctypes; a
    :class:`~splitwiser.decode_kernel.DecodeKernel`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.decode_attention
        pointers, sizes, factors = [ctypes.c_void_p] * 8, [ctypes.c_int64] * 7, [ctypes.c_float] * 2
        self._function.argtypes = [ctypes.c_int64, *pointers, *sizes, *factors, ctypes.c_int64]
        self._function.restype = None

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        starts: Tensor,
        lengths: Tensor,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`splitwiser.decode_kernel.DecodeKernel.__call__`."""
        query = query.contiguous()
        requests, heads, key_dim = query.shape
        _, block_tokens, kv_heads, value_dim = values.shape
        output = query.new_empty(requests, heads, value_dim)
        sinks = None if sinks is None else sinks.float().contiguous()
        self._function(
            _DTYPES[query.dtype], query.data_ptr(), keys.data_ptr(), values.data_ptr(), tables.data_ptr(),
            starts.data_ptr(), lengths.data_ptr(), None if sinks is None else sinks.data_ptr(), output.data_ptr(),
            requests, heads, kv_heads, key_dim, value_dim, block_tokens, tables.shape[1], scaling, softcap or 0.0,
            torch.get_num_threads(),
        )  # fmt: skip
        return output


def load_cpu_kernel() -> tuple[CpuKernel | None, str]:
    """The kernel and a line for the run's record; None, and the reason, where it cannot be had."""
    library, described = load_native()
    return (None, described) if library is None else (CpuKernel(library), f"decode_attention.cpp, {described}")
