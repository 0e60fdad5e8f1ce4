"""Prefill attention for GPUs: all prompts of a step in one call of PyTorch's variable-length attention."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from splitwiser.model.kernels.interface import LayerShape

LARGEST_HEAD = 256


class PackedAttention:
    """``torch.nn.attention.varlen.varlen_attn``; a :class:`~splitwiser.model.kernels.interface.PackedKernel`."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        offsets: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        window: int | None,
        scaling: float,
    ) -> Tensor:
        """See :meth:`splitwiser.model.kernels.interface.PackedKernel.__call__`."""
        varlen_attn, grouped = _function()
        left = -1 if window is None else window - 1
        output: Tensor = varlen_attn(
            query, keys, values, *offsets, *longest, scale=scaling, window_size=(left, 0), **grouped
        )
        return output


def find_problem(dtype: torch.dtype, layers: Sequence[LayerShape]) -> str | None:
    """Why :class:`PackedAttention` cannot serve ``layers`` in ``dtype``, in a few words; None if it can on a GPU that has
    FlashAttention, which a trial shows."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "one call for all prompts takes half precisions only"
    if any(layer.key_dim != layer.value_dim or layer.key_dim % 8 or layer.key_dim > LARGEST_HEAD for layer in layers):
        return f"one call for all prompts takes heads of a multiple of 8 up to {LARGEST_HEAD}, keys like values"
    return None


@cache
def _function() -> tuple[Callable[..., Any], dict[str, bool]]:
    """The function, and what has it take fewer K/V heads than heads: an argument from PyTorch 2.12 on, before by itself."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn, grouped
