"""Falcon, in all its forms: multi-query (7b), groups of queries (40b, 180b) and multi-head with ALiBi (rw)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from splitwiser.model.dispatch.alibi import alibi_table
from splitwiser.model.dispatch.base import DispatchedAttention, library_of, split_groups


class FalconAttention(DispatchedAttention):
    """Takes the place of transformers' ``FalconAttention``. Each key and value is stored once, not once per query head."""

    def __init__(self, own: Any, bias: Tensor | None) -> None:  # noqa: ANN401  # transformers' module
        super().__init__(own.layer_idx, own.inv_norm_factor, bias, bias_by_position=True)
        self.kv_heads, self.head_dim = own.num_kv_heads, own.head_dim
        self.query_key_value, self.dense = own.query_key_value, own.dense
        self.rotate = library_of(own).apply_rotary_pos_emb

    def forward(
        self,
        hidden_states: Tensor,
        alibi: object = None,
        attention_mask: object = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Return the output for ``hidden_states`` (1, tokens, width)."""
        query, key, value = split_groups(self.query_key_value(hidden_states), self.kv_heads, self.head_dim)
        if self.bias is None:
            assert position_embeddings is not None
            query, key = self.rotate(query, key, *position_embeddings)
        return self.dense(self.attend(query, key, value, attention_mask)), None


def make_attention(model: PreTrainedModel) -> Callable[[Any], nn.Module]:
    """See :data:`splitwiser.model.dispatch.table.REPLACEMENTS`."""
    config = model.config
    bias = alibi_table(model, (config.hidden_size // config.num_attention_heads) ** 0.5) if config.alibi else None
    return lambda own: FalconAttention(own, bias)


def make_linear(_: PreTrainedModel) -> Callable[[Any], nn.Module]:
    """See :data:`splitwiser.model.dispatch.table.REPLACEMENTS`: Falcon's linear layer rounds once more, before it adds the
    bias; a plain one can be packed."""

    def plain(own: nn.Linear) -> nn.Linear:
        layer = nn.Linear(own.in_features, own.out_features, device="meta")
        layer.weight, layer.bias = own.weight, own.bias
        return layer

    return plain
