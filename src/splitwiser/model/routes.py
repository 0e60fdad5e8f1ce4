"""The routes by which models are served: by the kind of a model, how it is proven, prefilled and decoded.

Another kind is a module with these functions and a row in :data:`ROUTES`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from splitwiser.model import compatibility, forward
from splitwiser.model.checkpoints.catalog import Kind
from splitwiser.model.fixed_step import FixedDecodeStep
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import Segment
from splitwiser.model.seq2seq import attach as seq2seq_attach
from splitwiser.model.seq2seq import forward as seq2seq_forward


class Attach(Protocol):
    """Makes a model attend through the KV pool, and proves that it is served exactly."""

    def __call__(self, model: LoadedModel, *, pack: bool = False, remember: bool = False) -> list[LayerShape]:
        """See :func:`splitwiser.model.compatibility.attach_engine`."""
        ...


@dataclass(frozen=True)
class Route:
    """How models of one kind are served.

    ``attach`` makes a model attend through the pool, ``try_kernels`` says which kernels cannot serve it, and
    ``padding_changes_tokens`` whether mode ``generate`` may pad its prompts. ``prefill`` takes segments with the tokens of
    all, one after another, and the numbers of the tokens whose logits are wanted; ``decode`` one token of each segment;
    ``hybrid`` what both take, for one step of both; and ``fixed`` a step that holds its own inputs. All store K and V in the
    pool and return logits, (rows, vocabulary).
    ``prefill_attention`` says for the run's record what attends in prefill, None if the kernels of the pool do.
    """

    attach: Attach
    try_kernels: Callable[[LoadedModel, Sequence[LayerShape], PoolKernels, int], dict[str, str]]
    padding_changes_tokens: Callable[[LoadedModel], bool]
    prefill: Callable[[LoadedModel, KVPool, Sequence[Segment], Sequence[int], Sequence[int]], Tensor]
    decode: Callable[[LoadedModel, KVPool, Sequence[Segment], Sequence[int]], Tensor]
    hybrid: Callable[
        [LoadedModel, KVPool, Sequence[Segment], Sequence[int], Sequence[int], Sequence[Segment], Sequence[int]], Tensor
    ]
    fixed: Callable[[LoadedModel, FixedDecodeStep], Tensor]
    prefill_attention: str | None = None


ROUTES: dict[Kind, Route] = {
    "decoder": Route(
        compatibility.attach_engine,
        compatibility.try_kernels,
        compatibility.padding_changes_tokens,
        forward.prefill_logits,
        forward.decode_logits,
        forward.hybrid_logits,
        forward.fixed_logits,
    ),
    "encoder-decoder": Route(
        seq2seq_attach.attach_engine,
        seq2seq_attach.try_kernels,
        seq2seq_attach.padding_changes_tokens,
        seq2seq_forward.prefill_logits,
        seq2seq_forward.decode_logits,
        seq2seq_forward.hybrid_logits,
        seq2seq_forward.fixed_logits,
        "torch.nn.functional.scaled_dot_product_attention, one source at a time",
    ),
}
