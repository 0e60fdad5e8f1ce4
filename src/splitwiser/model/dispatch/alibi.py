"""ALiBi (Press et al., arXiv 2108.12409) as Falcon and Bloom compute it: a bias by the position of the key.

The numbers are those of the model's own function ``build_alibi_tensor``, which rounds them: Falcon's to bfloat16 in every
dtype, Bloom's to the dtype of the model. So they are no function of the distance between key and query.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from splitwiser.model.dispatch.base import library_of
from splitwiser.model.loading import max_positions


def alibi_table(model: PreTrainedModel, divisor: float = 1.0) -> Tensor:
    """Return ``model``'s biases divided by ``divisor`` in its dtype: float32 of shape (heads, positions), on its device."""
    positions = max_positions(model.config)
    assert positions is not None
    mask = torch.ones(1, positions, dtype=torch.long, device=model.device)
    heads = model.config.num_attention_heads
    table: Tensor = library_of(model).build_alibi_tensor(mask, heads, model.dtype)
    return (table.view(heads, positions) / divisor).float()


def has_alibi(model: PreTrainedModel) -> bool:
    """Whether ``model`` computes its biases as described above."""
    return hasattr(library_of(model), "build_alibi_tensor") and getattr(model.config, "alibi", True)


@contextmanager
def alibi_from(model: PreTrainedModel, start: int) -> Iterator[None]:
    """Let ``model``'s own forward compute a prompt's biases as if its first token were at position ``start``, less that
    token's: no softmax sees what all have in common, and scores in a half precision would round away beside it."""
    library = library_of(model)
    own = library.build_alibi_tensor

    def later(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        biases: Tensor = own(mask.new_ones(len(mask), start + mask.shape[1]), heads, dtype)
        return biases[..., start:] - biases[..., start : start + 1]

    library.build_alibi_tensor = later
    try:
        yield
    finally:
        library.build_alibi_tensor = own
