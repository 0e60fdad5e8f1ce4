"""GPT-Neo: scores without a scale, and layers that see a window."""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import sliding_window_causal_mask_function

from splitwiser.model.attention import Mask
from splitwiser.model.dispatch.base import DispatchedAttention


class GPTNeoAttention(DispatchedAttention):
    """Takes the place of transformers' ``GPTNeoSelfAttention``; ``window`` tokens are seen, None: all earlier ones."""

    def __init__(self, own: Any, window: int | None) -> None:  # noqa: ANN401  # transformers' module
        super().__init__(own.layer_id, 1.0)
        self.heads, self.window = own.num_heads, window
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = own.q_proj, own.k_proj, own.v_proj, own.out_proj

    def forward(self, hidden_states: Tensor, attention_mask: object = None, **_: object) -> tuple[Tensor, None]:
        """Return the output for ``hidden_states`` (1, tokens, width)."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = attention_mask if self.window is None else _window(self.window)
        return self.out_proj(self.attend(query, key, value, mask)), None


@cache  # one object for all layers: what a step derives from a mask is kept by it
def _window(tokens: int) -> Mask:
    return Mask(sliding_window_causal_mask_function(tokens))


def make_attention(model: PreTrainedModel) -> Callable[[Any], nn.Module]:
    """See :data:`splitwiser.model.dispatch.table.REPLACEMENTS`."""
    window = model.config.window_size
    return lambda own: GPTNeoAttention(own, window if own.attention_type == "local" else None)
