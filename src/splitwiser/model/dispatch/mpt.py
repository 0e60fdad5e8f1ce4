"""MPT."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from splitwiser.model.dispatch.base import DispatchedAttention, library_of


class MptAttention(DispatchedAttention):
    """Takes the place of transformers' ``MptAttention``; its ALiBi is exact in float32, a bias by distance."""

    def __init__(self, own: Any, bias: Tensor) -> None:  # noqa: ANN401  # transformers' module
        super().__init__(own.layer_idx, own.softmax_scale, bias)
        self.heads, self.limit = own.n_heads, own.clip_qkv
        self.Wqkv, self.out_proj = own.Wqkv, own.out_proj

    def forward(
        self, hidden_states: Tensor, position_bias: object = None, attention_mask: object = None, **_: object
    ) -> tuple[Tensor, None]:
        """Return the output for ``hidden_states`` (1, tokens, width)."""
        joint = self.Wqkv(hidden_states)
        if self.limit:
            joint = joint.clamp(-self.limit, self.limit)
        query, key, value = joint.unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        return self.out_proj(self.attend(query, key, value, attention_mask)), None


def make_attention(model: PreTrainedModel) -> Callable[[Any], nn.Module]:
    """See :data:`splitwiser.model.dispatch.table.REPLACEMENTS`."""
    heads, positions = model.config.n_heads, model.config.max_seq_len
    by_key: Tensor = library_of(model).build_mpt_alibi_tensor(heads, positions, device=model.device)
    bias = by_key.view(heads, positions).flip(-1).contiguous()  # the model's last entry is that of the query itself
    return lambda own: MptAttention(own, bias)
