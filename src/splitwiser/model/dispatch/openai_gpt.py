"""GPT, the first: transformers' own has no KV cache at all and computes all tokens anew in each step."""

from collections.abc import Callable
from itertools import count
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

from splitwiser.model.attention import Mask
from splitwiser.model.dispatch.base import DispatchedAttention

_CAUSAL = Mask(causal_mask_function)  # the model makes no mask


class OpenAIGPTAttention(DispatchedAttention):
    """Takes the place of transformers' ``Attention`` of this model."""

    def __init__(self, own: Any, layer_idx: int) -> None:  # noqa: ANN401  # transformers' module
        super().__init__(layer_idx, (own.split_size // own.n_head) ** -0.5 if own.scale else 1.0)
        self.heads, self.c_attn, self.c_proj = own.n_head, own.c_attn, own.c_proj

    def forward(self, hidden_states: Tensor, **_: object) -> list[Tensor]:
        """Return the output for ``hidden_states`` (1, tokens, width)."""
        joint = self.c_attn(hidden_states).unflatten(-1, (3, self.heads, -1))
        query, key, value = joint.transpose(1, 3).unbind(2)
        return [self.c_proj(self.attend(query, key, value, _CAUSAL))]


def make_attention(_: PreTrainedModel) -> Callable[[Any], nn.Module]:
    """See :data:`splitwiser.model.dispatch.table.REPLACEMENTS`."""
    numbers = count()
    return lambda own: OpenAIGPTAttention(own, next(numbers))
