"""XGLM."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from splitwiser.model.dispatch.base import DispatchedAttention


class XGLMAttention(DispatchedAttention):
    """Takes the place of transformers' ``XGLMAttention`` in a decoder without an encoder."""

    def __init__(self, own: Any) -> None:  # noqa: ANN401  # transformers' module
        super().__init__(own.layer_idx, own.scaling)
        self.heads = own.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = own.q_proj, own.k_proj, own.v_proj, own.out_proj

    def forward(self, hidden_states: Tensor, attention_mask: object = None, **_: object) -> tuple[Tensor, None]:
        """Return the output for ``hidden_states`` (1, tokens, width)."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attend(query, key, value, attention_mask)), None


def make_attention(_: PreTrainedModel) -> Callable[[Any], nn.Module]:
    """See :data:`splitwiser.model.dispatch.table.REPLACEMENTS`."""
    return XGLMAttention
