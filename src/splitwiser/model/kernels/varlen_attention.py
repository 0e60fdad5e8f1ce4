"""Prefill attention for GPUs: all prompts of a step in one call of PyTorch's variable-length attention."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from splitwiser.model.kernels.interface import LayerShape

MAX_HEAD_DIM = 256


class VarlenAttention:
    """``torch.nn.attention.varlen.varlen_attn`` as a :class:`~splitwiser.model.kernels.interface.VarlenKernel`."""

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
        """See :meth:`splitwiser.model.kernels.interface.VarlenKernel.__call__`."""
        varlen_attn, grouped = _function()
        left = -1 if window is None else window - 1
        output: Tensor = varlen_attn(
            query, keys, values, *offsets, *longest, scale=scaling, window_size=(left, 0), **grouped
        )
        return output


def find_varlen_problem(dtype: torch.dtype, layers: Sequence[LayerShape]) -> str | None:
    """Return why :class:`VarlenAttention` cannot serve ``layers`` in ``dtype``, in a few words; None if it can on a GPU that
    has FlashAttention, which a trial shows."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "one call for all prompts takes half precisions only"
    if any(layer.key_dim != layer.value_dim or layer.key_dim % 8 or layer.key_dim > MAX_HEAD_DIM for layer in layers):
        return (
            f"one call for all prompts takes heads of a multiple of 8 up to {MAX_HEAD_DIM}, keys and values of one size"
        )
    return None


@cache
def _function() -> tuple[Callable[..., Any], dict[str, bool]]:
    """Return the function, and the argument that lets it take fewer K/V heads than heads: needed from PyTorch 2.12 on, not
    known to earlier versions, which always allow it."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn, grouped
