"""What the attention modules of all families have in common."""

import sys
from typing import Any

from torch import Tensor, nn

from splitwiser.model.attention import attention_function, current_step


class DispatchedAttention(nn.Module):
    """Takes the place of a layer's own attention: stores and attends through the current
    :class:`~splitwiser.model.attention.AttentionStep`, as models that call transformers' attention interface do.

    A subclass takes over the projections of the module that it replaces, under the same names, and computes queries, keys
    and values from them as that module does. ``scaling``, ``bias`` and ``bias_by_position`` are those of
    :class:`~splitwiser.model.attention.AttentionOptions`.
    """

    bias: Tensor | None

    def __init__(
        self, layer_idx: int, scaling: float, bias: Tensor | None = None, bias_by_position: bool = False
    ) -> None:
        super().__init__()
        self.layer_idx, self.scaling, self.bias_by_position = layer_idx, scaling, bias_by_position
        self.register_buffer("bias", bias, persistent=False)  # one tensor for all layers, so that it is shared once

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object) -> Tensor:
        """Store ``key`` and ``value`` (1, kv heads, tokens, head size) and attend from ``query`` (1, heads, tokens, head
        size). Returns (1, tokens, heads x head size)."""
        key, value = current_step().update(key, value, self.layer_idx)
        attended, _ = attention_function(
            self, query, key, value, mask, self.scaling, bias=self.bias, bias_by_position=self.bias_by_position
        )
        return attended.flatten(2)


def split_groups(joint: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of ``joint`` (1, tokens, numbers), in which each of ``kv_heads`` groups has its
    queries, then one key and one value: (1, heads, tokens, head size) each."""
    groups = joint.unflatten(-1, (kv_heads, -1, head_dim))
    query, key, value = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def library_of(part: nn.Module) -> Any:  # noqa: ANN401  # a module of Python, with whatever it defines
    """Return the module of transformers that defines the class of ``part``: its functions are used as they are."""
    return sys.modules[type(part).__module__]
