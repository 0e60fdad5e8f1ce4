"""The compiled attention and store kernels for CPUs, csrc/attention.cpp."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from splitwiser.model.kernels.build import load_native
from splitwiser.model.kernels.greedy import CpuLikeliest
from splitwiser.model.kernels.interface import LayerShape, PoolKernels

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CpuAttention:
    """The function ``attention`` as an :class:`~splitwiser.model.kernels.interface.AttentionKernel`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.attention

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
        tokens, heads, key_dim = query.shape
        if query.stride()[1:] != (key_dim, 1):
            query = query.contiguous()
        _, block_tokens, kv_heads, value_dim = values.shape
        output = query.new_empty(tokens, heads, value_dim)
        sinks = None if sinks is None else sinks.float().contiguous()
        self._function(
            _DTYPES[query.dtype], query.data_ptr(), keys.data_ptr(), values.data_ptr(), tables.data_ptr(),
            starts.data_ptr(), offsets.data_ptr(), lengths.data_ptr(), None if sinks is None else sinks.data_ptr(),
            None if bias is None else bias.data_ptr(), 0 if bias is None else bias.shape[1], bias_by_position,
            output.data_ptr(), query.stride(0), len(lengths), heads, kv_heads, key_dim, value_dim, block_tokens,
            tables.shape[1], scaling, softcap or 0.0, torch.get_num_threads(),
        )  # fmt: skip
        return output


class CpuStore:
    """The function ``store`` as a :class:`~splitwiser.model.kernels.interface.StoreKernel`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.store

    def __call__(self, pool_keys: Tensor, pool_values: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """See :meth:`splitwiser.model.kv_pool.KVPool.write`."""
        keys, values = _with_contiguous_tokens(keys), _with_contiguous_tokens(values)
        size = keys.element_size()
        self._function(
            keys.data_ptr(), values.data_ptr(), slots.data_ptr(), pool_keys.data_ptr(), pool_values.data_ptr(), len(slots),
            keys.stride(0) * size, values.stride(0) * size, size * pool_keys[0, 0].numel(), size * pool_values[0, 0].numel(),
            torch.get_num_threads(),
        )  # fmt: skip


def _with_contiguous_tokens(tensor: Tensor) -> Tensor:
    """Return ``tensor`` (tokens, kv heads, head size) if each token's numbers are contiguous, else a copy."""
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()


def load_cpu_kernels(dtype: torch.dtype, layers: Sequence[LayerShape]) -> tuple[PoolKernels, dict[str, str]]:
    """Return the kernels of a CPU; see :func:`splitwiser.model.kernels.choose.load_kernels`."""
    library, described = load_native()
    fused = "torch.nn.functional.scaled_dot_product_attention"
    if library is None:
        return PoolKernels(), {"prefill_attention": fused, "decode_attention": described}
    attention, compiled = CpuAttention(library), f"attention.cpp, {described}"
    supports_prefill = all(
        library.attention_supports_prefill(_DTYPES[dtype], layer.key_dim, layer.value_dim) for layer in layers
    )
    prefill = attention if supports_prefill else None
    return PoolKernels(attention, prefill, CpuStore(library), likeliest=CpuLikeliest(library)), {
        "prefill_attention": compiled
        if supports_prefill
        else f"{fused} (attention.cpp does it in bfloat16 on AVX-512)",
        "decode_attention": compiled,
    }
