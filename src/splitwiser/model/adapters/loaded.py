"""An adapter in memory, as it was read and before a model serves it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from splitwiser.model.adapters.files import AdapterFiles


@dataclass(frozen=True)
class LoraPart:
    """What a LoRA adapter adds to the output of one linear layer: ``scaling * up @ down @ input``, with ``down`` of shape
    (rank, in features) and ``up`` of shape (out features, rank)."""

    down: Tensor
    up: Tensor
    scaling: float


KeysValues = list[tuple[Tensor, Tensor]]
"""K and V of virtual tokens: a pair for each layer, each of shape (kv_heads, tokens, head size)."""


@dataclass(frozen=True)
class LoadedAdapter:
    """``parts`` of LoRA by the path of the layer within the model, or the ``keys_values`` of virtual tokens; neither if it
    is merged into the model's weights. ``logits`` are those that peft's own model gives in a prefill step of ``prompt`` and
    in a decode step of the token ``next_token``, float32 of shape (2, vocabulary)."""

    files: AdapterFiles
    prompt: Sequence[int]
    next_token: int
    logits: Tensor
    parts: Mapping[str, LoraPart] = field(default_factory=dict)
    keys_values: KeysValues = field(default_factory=list)
