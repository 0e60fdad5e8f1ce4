"""GPT-NeoX Japanese."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitwiser.model.dispatch.base import DispatchedAttention, library_of


class GPTNeoXJapaneseAttention(DispatchedAttention):
    """Takes the place of transformers' ``GPTNeoXJapaneseAttention``, which rotates a part of each head and leaves its
    output's bias to the layer."""

    def __init__(self, own: Any) -> None:  # noqa: ANN401  # transformers' module
        super().__init__(own.layer_idx, 1.0 / own.norm_factor)
        self.heads, self.rotary = own.num_attention_heads, own.rotary_ndims
        self.query_key_value, self.dense, self.dense_bias = own.query_key_value, own.dense, own.dense_bias
        self.rotate = library_of(own).apply_rotary_pos_emb

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object,
        position_embeddings: tuple[Tensor, Tensor],
        **_: object,
    ) -> tuple[Tensor, None, Tensor | None]:
        """Return the output for ``hidden_states`` (1, tokens, width), and its bias."""
        joint = self.query_key_value(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = joint.chunk(3, dim=-1)
        rotated = self.rotate(query[..., : self.rotary], key[..., : self.rotary], *position_embeddings)
        query, key = (
            torch.cat([turned, each[..., self.rotary :]], dim=-1)
            for turned, each in zip(rotated, (query, key), strict=True)
        )
        return self.dense(self.attend(query, key, value, attention_mask)), None, self.dense_bias


def make_attention(_: PreTrainedModel) -> Callable[[Any], nn.Module]:
    """See :data:`splitwiser.model.dispatch.table.REPLACEMENTS`."""
    return GPTNeoXJapaneseAttention
