"""GPT-J and CodeGen, which dispatch their attention themselves from transformers 5.24 on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitwiser.model.dispatch.base import DispatchedAttention, library_of


class _RotaryAttention(DispatchedAttention):
    """Rotates the first ``rotary_dim`` numbers of each head, by a table of sines and cosines."""

    embed_positions: Tensor

    def __init__(self, own: Any) -> None:  # noqa: ANN401  # transformers' module
        super().__init__(own.layer_idx, 1.0 / own.scale_attn)
        self.heads, self.rotary_dim = own.num_attention_heads, own.rotary_dim or own.head_dim
        self.out_proj = own.out_proj
        self.register_buffer("embed_positions", own.embed_positions, persistent=False)
        self.rotate = library_of(own).apply_rotary_pos_emb

    def attend_rotated(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, mask: object) -> Tensor:
        """Rotate ``query`` and ``key`` and attend; all (1, tokens, heads, head size). Returns the layer's output."""
        sine, cosine = self.embed_positions[positions].to(value.dtype).chunk(2, dim=-1)
        query, key = (
            torch.cat([self.rotate(each[..., : self.rotary_dim], sine, cosine), each[..., self.rotary_dim :]], dim=-1)
            for each in (query, key)
        )
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        output: Tensor = self.out_proj(self.attend(query, key, value, mask))
        return output


class GPTJAttention(_RotaryAttention):
    """Takes the place of transformers' ``GPTJAttention``."""

    def __init__(self, own: Any) -> None:  # noqa: ANN401  # transformers' module
        super().__init__(own)
        self.q_proj, self.k_proj, self.v_proj = own.q_proj, own.k_proj, own.v_proj

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, attention_mask: object = None, **_: object
    ) -> tuple[Tensor, None]:
        """Return the output for ``hidden_states`` (1, tokens, width)."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.attend_rotated(query, key, value, position_ids, attention_mask), None


class CodeGenAttention(_RotaryAttention):
    """Takes the place of transformers' ``CodeGenAttention``, whose projections are in four parts."""

    def __init__(self, own: Any) -> None:  # noqa: ANN401  # transformers' module
        super().__init__(own)
        self.qkv_proj = own.qkv_proj

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, attention_mask: object = None, **_: object
    ) -> tuple[Tensor, None]:
        """Return the output for ``hidden_states`` (1, tokens, width)."""
        parts = self.qkv_proj(hidden_states).unflatten(-1, (4, 3, self.heads // 4, -1))
        query, value, key = (part.flatten(2, 3) for part in parts.unbind(3))
        return self.attend_rotated(query, key, value, position_ids, attention_mask), None


def make_gptj(_: PreTrainedModel) -> Callable[[Any], nn.Module]:
    """See :data:`splitwiser.model.dispatch.table.REPLACEMENTS`."""
    return GPTJAttention


def make_codegen(_: PreTrainedModel) -> Callable[[Any], nn.Module]:
    """See :data:`splitwiser.model.dispatch.table.REPLACEMENTS`."""
    return CodeGenAttention
