"""The parts of an encoder-decoder that depend on where a token stands, replaced by tables: a step packs tokens of many
requests, whose positions the model cannot know.

Each table is made by the part that it replaces, asked for all that it can give.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitwiser.errors import UnsupportedModelError
from splitwiser.model.attention import current_step
from splitwiser.model.seq2seq.steps import PackedStep


class RelativeBias(nn.Module):
    """A bias of attention scores by distance: ``table`` is float32 of shape (heads, distances); see :func:`bias_table`."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, *_: object, **__: object) -> Tensor:
        """Return the table, whatever the lengths of queries and keys that the model asks for."""
        return self.table


class NoBias(nn.Module):
    """What a layer without a bias adds: nothing, where transformers would make a tensor of zeros for every pair."""

    def forward(self, *_: object, **__: object) -> None:
        """Return None."""


class PositionTable(nn.Module):
    """Embeddings of positions as a table (positions, hidden size), read at the positions of the current step."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, *_: object, **__: object) -> Tensor:
        """Return the embeddings of the step's tokens, (1, tokens, hidden size), whatever it is called with."""
        step = current_step()
        assert isinstance(step, PackedStep)
        return self.table[step.positions][None]


@torch.no_grad()
def replace_parts(module: PreTrainedModel, max_positions: int | None) -> None:
    """Replace the relative biases and the embeddings of positions within ``module``. Raises :class:`UnsupportedModelError`
    if a bias does not depend on the distance alone."""
    parts: list[Any] = list(module.modules())
    for part in parts:
        if hasattr(part, "compute_bias") and hasattr(part, "has_relative_attention_bias"):
            bias = RelativeBias(bias_table(part)) if part.has_relative_attention_bias else NoBias()
            part.add_module("relative_bias", bias)  # so that its table moves and is shared with the weights
            object.__setattr__(part, "compute_bias", bias)
            part.has_relative_attention_bias = True  # also asked where there is none
    for half in (module.get_encoder(), module.get_decoder()):
        if isinstance(getattr(half, "embed_positions", None), nn.Module) and max_positions is not None:
            half.embed_positions = PositionTable(_position_table(half, max_positions))


def bias_table(attention: Any) -> Tensor:  # noqa: ANN401  # an attention of any of T5's relatives
    """Return the relative bias of T5's ``attention`` by distance, float32 of shape (heads, entries): in a decoder, entry d
    for the key d tokens before the query; in an encoder, whose 2n + 1 entries go both ways, entry n + d for the key d tokens
    after it. What is farther takes the first or the last entry. Raises :class:`UnsupportedModelError` if that does not give
    what the model computes at twice the distance."""
    most = int(attention.relative_attention_max_distance)
    asked = 4 * most + 1
    biases: Tensor = attention.compute_bias(asked, asked)[0].float()  # (heads, queries, keys)
    middle = biases[:, asked // 2]  # of the query in the middle, by key: every distance up to 2 * most, both ways
    table = middle[:, most : 3 * most + 1]
    distances = torch.arange(-2 * most, 2 * most + 1, device=table.device)
    if attention.is_decoder:
        table, distances = table[:, : most + 1].flip(-1), -distances[: 2 * most + 1]
        expected, entries = middle[:, : 2 * most + 1], distances.clamp(max=most)
    else:
        expected, entries = middle, distances.clamp(-most, most) + most
    if not torch.equal(table[:, entries], expected):
        raise UnsupportedModelError(f"{type(attention).__name__}: its bias goes on beyond {most} tokens")
    return table.contiguous()


def _position_table(half: Any, positions: int) -> Tensor:  # noqa: ANN401  # an encoder or a decoder
    """Return what ``half``, an encoder or a decoder, adds to its tokens at each of its ``positions``, (positions, hidden
    size)."""
    # some look at the tokens, to see which are padding
    token = 0 if half.config.pad_token_id != 0 else 1
    ids = torch.full((1, positions), token, device=half.device)
    found: list[Tensor] = []

    def keep(_: nn.Module, __: object, embeddings: Tensor) -> None:
        found.append(embeddings)
        raise _Found

    handle = half.embed_positions.register_forward_hook(keep)
    try:
        with suppress(_Found):
            half(input_ids=ids)
    finally:
        handle.remove()
    return found[0].reshape(positions, -1).clone()


class _Found(Exception):  # noqa: N818  # it is no error
    """Ends a forward of which only a first part was wanted."""
