"""Rotary positions whose frequencies depend on the length of a request: dynamic NTK and longrope.

transformers' rotary modules choose the frequencies of a whole forward by its longest position, and keep them for the next
one. With requests packed in one row, each token has to be rotated as in a forward of its own request.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from splitwiser.model.attention import current_step

_TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
_LONG = 2**31  # a length beyond all positions
# Models whose generation begins anew, without a cache, when a request outgrows the original length of longrope. Of some it
# then computes the last token alone and forgets all others: of these too before transformers 5.24, and of others still.
_BEGINS_ANEW = {"phi3", "phimoe"} if _TRANSFORMERS >= (5, 24) else set()
_FORGETS = {"phi3", "phimoe", "phi4_multimodal"} - _BEGINS_ANEW


class LengthRotary(nn.Module):
    """Calls a model's own rotary module ``own`` once for each kind of length in a step, and takes each token's result from
    the call for its request's length.

    Each call is of a copy with buffers of its own: ``own`` keeps what it chose last, and workers share its buffers.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        _forget_length(own)
        self.own = own

    def forward(self, x: Tensor, position_ids: Tensor, *layer_type: str) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (1, tokens, rotary size) each in the dtype of ``x``, for the positions ``position_ids``
        (1, tokens)."""
        scaling = _find_scaling(self.own, *layer_type)
        if scaling is None:
            rotated: tuple[Tensor, Tensor] = self.own(x, position_ids, *layer_type)
            return rotated
        kind, original = scaling
        lengths = current_step().lengths(position_ids)
        if kind == "longrope":  # short or long
            lengths = torch.where(lengths > original, _LONG, original)
            kinds = [original, _LONG]
        else:
            lengths = lengths.clamp(min=original)
            kinds = lengths.unique().tolist()
        cosines, sines = self._rotated(x, position_ids, kinds[0], *layer_type)
        for length in kinds[1:]:
            other = self._rotated(x, position_ids, length, *layer_type)
            chosen = (lengths == length)[..., None]
            cosines, sines = torch.where(chosen, other[0], cosines), torch.where(chosen, other[1], sines)
        return cosines, sines

    def _rotated(self, x: Tensor, position_ids: Tensor, length: int, *layer_type: str) -> tuple[Tensor, Tensor]:
        """Return what a forward of ``length`` tokens gives; of positions beyond it, anything."""
        fresh = copy.copy(self.own)
        fresh._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in fresh._buffers.items()}
        last = torch.full_like(position_ids[:, :1], length - 1)
        cosines, sines = fresh(x, torch.cat([position_ids.clamp(max=length - 1), last], dim=1), *layer_type)
        return cosines[:, :-1], sines[:, :-1]


def serve_lengths(module: PreTrainedModel) -> None:
    """Replace the rotary modules of ``module`` whose frequencies depend on the length of a request."""
    for parent, name, own in list(_length_dependent(module)):
        setattr(parent, name, LengthRotary(own))


def depends_on_length(module: PreTrainedModel) -> bool:
    """Return whether positions are rotated by the length of a request."""
    return next(_length_dependent(module), None) is not None


def length_without_scaling(module: PreTrainedModel) -> float:
    """Return the length up to which a request's positions are rotated alike, whatever its length; infinite if all are."""
    scalings = (
        _find_scaling(own, *layer_type) for _, _, own in _length_dependent(module) for layer_type in _layer_types(own)
    )
    return min((scaling[1] for scaling in scalings if scaling), default=math.inf)


def forget_lengths(module: PreTrainedModel) -> None:
    """Let transformers' rotary modules of ``module`` begin as new: those of dynamic NTK keep the frequencies of the longest
    request so far for all that are longer than the original length."""
    for _, _, own in _length_dependent(module):
        _forget_length(own)


def rotary_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary parameters of a model: of all its layers, or of each type of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def length_computed_anew(config: PreTrainedConfig) -> int | None:
    """Return the length at which a request's K and V are to be computed anew, as the model's own generation does when a
    request grows past the original length of longrope; None if there is none."""
    text = config.get_text_config()
    original: int | None = getattr(text, "original_max_position_embeddings", None)
    scaled = any(each.get("rope_type") == "longrope" for each in rotary_parameters(text))
    return original + 1 if original and scaled and text.model_type in _BEGINS_ANEW else None


def last_length(config: PreTrainedConfig) -> int | None:
    """Return the length beyond which the model's own generation goes wrong, although it has positions; None if there is
    none."""
    text = config.get_text_config()
    original: int | None = getattr(text, "original_max_position_embeddings", None)
    return original if text.model_type in _FORGETS else None


def _length_dependent(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield each rotary module whose frequencies depend on the length of a request, after its parent and its name there."""
    for parent in module.modules():
        for name, own in parent.named_children():
            if any(_find_scaling(own, *layer_type) for layer_type in _layer_types(own)):
                yield parent, name, own


def _layer_types(own: nn.Module) -> list[tuple[str, ...]]:
    """Return the arguments beside positions that a rotary module is called with: none, or each type of layer."""
    kinds = getattr(own, "rope_type", None)
    return [(kind,) for kind in kinds] if isinstance(kinds, dict) else [()] if isinstance(kinds, str) else []


def _find_scaling(own: nn.Module, *layer_type: str) -> tuple[str, int] | None:
    """Return the kind of the scaling of a rotary module (of one type of layer), dynamic or longrope, and the length beyond
    which it changes; None if it does not depend on lengths."""
    config: Any = own.config
    kinds: Any = own.rope_type
    kind = kinds[layer_type[0]] if layer_type else kinds
    if kind == "dynamic":
        return kind, config.max_position_embeddings
    if kind == "longrope":
        parameters = config.rope_parameters[layer_type[0]] if layer_type else config.rope_parameters
        return kind, parameters["original_max_position_embeddings"]
    return None


def _forget_length(own: nn.Module) -> None:
    """Call a rotary module for one token, at which its frequencies are those of the original length again."""
    buffer = next(own.buffers())
    for layer_type in _layer_types(own):
        own(buffer, torch.zeros(1, 1, dtype=torch.long, device=buffer.device), *layer_type)
