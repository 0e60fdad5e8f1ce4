"""Bloom."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from splitwiser.model.dispatch.alibi import alibi_table
from splitwiser.model.dispatch.base import DispatchedAttention, split_groups


class BloomAttention(DispatchedAttention):
    """Takes the place of transformers' ``BloomAttention``."""

    def __init__(self, own: Any, bias: Tensor) -> None:  # noqa: ANN401  # transformers' module
        super().__init__(own.layer_idx, own.inv_norm_factor, bias, bias_by_position=True)
        self.heads, self.head_dim = own.num_heads, own.head_dim
        self.query_key_value, self.dense = own.query_key_value, own.dense

    def forward(
        self, hidden_states: Tensor, residual: Tensor, alibi: object = None, attention_mask: object = None, **_: object
    ) -> tuple[Tensor, None]:
        """Return the output for ``hidden_states`` plus ``residual``, (1, tokens, width) each."""
        query, key, value = split_groups(self.query_key_value(hidden_states), self.heads, self.head_dim)
        return residual + self.dense(self.attend(query, key, value, attention_mask)), None


def make_attention(model: PreTrainedModel) -> Callable[[Any], nn.Module]:
    """See :data:`splitwiser.model.dispatch.table.REPLACEMENTS`."""
    bias = alibi_table(model)
    return lambda own: BloomAttention(own, bias)
