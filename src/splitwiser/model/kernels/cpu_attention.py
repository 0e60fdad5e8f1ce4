"""The compiled attention and store kernels for CPUs, csrc/attention.cpp and csrc/store.cpp."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from splitwiser import constants
from splitwiser.model.kernels.build import load_native
from splitwiser.model.kernels.greedy import CpuLikeliest
from splitwiser.model.kernels.interface import AttentionKernel, LayerShape, PoolKernels
from splitwiser.model.kernels.stored import stored_size
from splitwiser.model.kernels.tile_trials import best_seconds, remembered_trial

TRIED_TOKENS = 512  # of the prompt on which prefill is tried

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class CpuAttention:
    """The function ``attention`` as an :class:`~splitwiser.model.kernels.interface.AttentionKernel`; prefill uses AMX if
    ``in_tiles``."""

    def __init__(self, library: ctypes.CDLL, in_tiles: bool = False) -> None:
        self._function, self._in_tiles = library.attention, in_tiles

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
        _, block_tokens, kv_heads, stored_values = values.shape
        value_dim = stored_values - stored_size(0, values.dtype)
        output = query.new_empty(tokens, heads, value_dim)
        sinks = None if sinks is None else sinks.float().contiguous()
        self._function(
            _DTYPES[keys.dtype], query.data_ptr(), keys.data_ptr(), values.data_ptr(), tables.data_ptr(),
            starts.data_ptr(), offsets.data_ptr(), lengths.data_ptr(), None if sinks is None else sinks.data_ptr(),
            None if bias is None else bias.data_ptr(), 0 if bias is None else bias.shape[1], bias_by_position,
            output.data_ptr(), query.stride(0), len(lengths), heads, kv_heads, key_dim, value_dim, block_tokens,
            tables.shape[1], scaling, softcap or 0.0, self._in_tiles, torch.get_num_threads(),
        )  # fmt: skip
        return output


class FlashPrefill:
    """PyTorch's flash attention for whole prompts under a causal mask, as an
    :class:`~splitwiser.model.kernels.interface.AttentionKernel`; everything else is left to ``compiled``."""

    def __init__(self, compiled: CpuAttention) -> None:
        self._compiled = compiled

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
        has_extras = bool(softcap) or sinks is not None or bias is not None
        if has_extras or bool(starts.any()) or not torch.equal(offsets.diff(), lengths):
            return self._compiled(
                query, keys, values, tables, starts, offsets, lengths, scaling, softcap, sinks, bias, bias_by_position
            )
        outputs = []
        for own, table in zip(query.split(lengths.tolist()), tables, strict=True):
            blocks = table[: -(-len(own) // keys.shape[1])]
            key, value = (kept[blocks].flatten(0, 1)[: len(own)].transpose(0, 1)[None] for kept in (keys, values))
            attended = scaled_dot_product_attention(
                own.transpose(0, 1)[None], key, value, is_causal=True, scale=scaling, enable_gqa=True
            )
            outputs.append(attended[0].transpose(0, 1))
        return torch.cat(outputs)


class CpuStore:
    """The function ``store`` as a :class:`~splitwiser.model.kernels.interface.StoreKernel`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __call__(self, pool_keys: Tensor, pool_values: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """See :meth:`splitwiser.model.kv_pool.KVPool.write`."""
        keys, values = _with_contiguous_tokens(keys), _with_contiguous_tokens(values)
        if pool_keys.dtype == torch.int8:
            self._library.store_int8(
                _DTYPES[keys.dtype], keys.data_ptr(), values.data_ptr(), slots.data_ptr(), pool_keys.data_ptr(),
                pool_values.data_ptr(), len(slots), keys.stride(0), values.stride(0), *keys.shape[1:], values.shape[2],
                torch.get_num_threads(),
            )  # fmt: skip
            return
        size = keys.element_size()
        self._library.store(
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
    prefill: AttentionKernel | None = None
    by = f"{fused} (attention.cpp does it in bfloat16 on AVX-512)"
    if supports_prefill:
        # flash attention would read int8 only after a pass of its own
        is_tried = layers and dtype != torch.int8
        prefill, by = _choose_prefill(library, layers[0], compiled) if is_tried else (attention, compiled)
    return PoolKernels(attention, prefill, CpuStore(library), likeliest=CpuLikeliest(library)), {
        "prefill_attention": by,
        "decode_attention": compiled,
    }


def _choose_prefill(library: ctypes.CDLL, layer: LayerShape, compiled: str) -> tuple[AttentionKernel, str]:
    """Return the fastest kernel for prefill on this machine, and what it is. They are tried on one prompt of a layer's shape
    if the processor has AMX; flash attention, which leaves much to the compiled kernel, must be faster by a quarter."""
    dots = CpuAttention(library)
    if not library.may_use_tiles():
        return dots, compiled
    kernels: dict[str, AttentionKernel] = {
        "dots": dots, "tiles": CpuAttention(library, in_tiles=True), "flash": FlashPrefill(dots)
    }  # fmt: skip

    def find() -> dict[str, float]:
        calls = _prefill_calls(kernels, layer)
        if not torch.allclose(calls["tiles"](), calls["dots"](), atol=1 / 64, rtol=1 / 64):
            del calls["tiles"]
        return best_seconds(calls)

    seconds = cast("dict[str, float]", remembered_trial(library, f"prefill {layer}", find))
    chosen = min(seconds, key=lambda name: seconds[name] * (1.25 if name == "flash" else 1))
    described = {
        "dots": compiled,
        "tiles": f"{compiled}, in AMX tiles",
        "flash": f"PyTorch's flash attention; {compiled}",
    }
    tried = ", ".join(f"{name} {1000 * each:.1f}" for name, each in seconds.items())
    return kernels[chosen], f"{described[chosen]} (ms for {TRIED_TOKENS} tokens: {tried})"


def _prefill_calls(kernels: Mapping[str, AttentionKernel], layer: LayerShape) -> dict[str, Callable[[], Tensor]]:
    """Return calls of ``kernels`` for one prompt with random queries, keys and values."""
    generator, block = torch.Generator().manual_seed(0), constants.BLOCK_TOKENS
    blocks, heads = -(-TRIED_TOKENS // block), min(layer.kv_heads, 8)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16()

    query, keys = drawn(TRIED_TOKENS, heads, layer.key_dim), drawn(blocks, block, heads, layer.key_dim)
    values, tables = drawn(blocks, block, heads, layer.value_dim), torch.arange(blocks)[None]
    starts, offsets = torch.zeros(TRIED_TOKENS, dtype=torch.long), torch.tensor([0, TRIED_TOKENS])
    arguments = query, keys, values, tables, starts, offsets, offsets[1:], layer.key_dim**-0.5
    return {name: partial(kernel, *arguments) for name, kernel in kernels.items()}
