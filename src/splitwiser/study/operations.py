"""Counts the operations and bytes of a step from the loaded module and the attention masks of its layers."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from splitwiser.errors import UnsupportedModelError
from splitwiser.model import attention
from splitwiser.model.attention import AttentionOptions, AttentionStep, Mask
from splitwiser.model.fused import FusedLayer
from splitwiser.model.fusing import run_decoder
from splitwiser.model.kernels.int8_linear import Int8Linear
from splitwiser.model.kernels.packed_linear import PackedLinear, compressed_share
from splitwiser.model.kernels.stored import stored_size
from splitwiser.model.loading import LoadedModel
from splitwiser.model.seq2seq.attach import run_both_halves

# names of the number of experts per token in configurations
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
_ROWS = 512  # positions of a prompt whose masks are computed at once


@dataclass(frozen=True)
class StepWork:
    """Floating point operations (a multiplication and an addition are two) and bytes moved to and from memory."""

    flops: float
    nbytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.nbytes


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention: query and K/V heads, sizes of a key and a value, and which positions see which."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    mask: Mask

    def seen_by(self, position: int) -> int:
        """Return the number of positions that the token at ``position`` attends to, including itself."""
        return position + 1 if self.mask.is_causal else _seen(self.mask, position, position + 1)

    def pairs(self, start: int, tokens: int) -> int:
        """Return the positions attended to, summed over ``tokens`` tokens from position ``start`` on."""
        if self.mask.is_causal:
            return tokens * start + tokens * (tokens + 1) // 2
        return _seen(self.mask, start, start + tokens)


@cache
def _seen(mask: Mask, start: int, end: int) -> int:
    positions = torch.arange(end)
    rows = positions[start:].split(_ROWS)
    return sum(int((mask(each[:, None], positions[None]) & (positions <= each[:, None])).sum()) for each in rows)


@dataclass(frozen=True)
class ExpertWeights:
    """All weights (``numbers``) of ``experts`` experts, of which each token uses ``active``."""

    numbers: int
    experts: int
    active: int

    def touched(self, tokens: int) -> float:
        """Return the expected number of weights that ``tokens`` tokens use at least once (uniform choice)."""
        return self.numbers * (1 - (1 - self.active / self.experts) ** tokens)


@dataclass(frozen=True)
class Architecture:
    """Weight counts and attention layers of a model.

    ``weights`` counts the weights of the matrix products of every token, ``head`` those of the output layer, which only the
    kept rows pass through; an embedding look-up is not a product. ``itemsize`` is the number of bytes of an expert's
    weight, and ``weight_bytes`` that of another weight on average, less if they are compressed or int8. K and V are stored
    as ``kv_dtype``. ``head_keeps_rows`` is False for a class that computes the logits of all tokens. ``last_weights``
    counts those of the ``weights`` that in prefill only the ends of prompts pass through, as they alone attend in the last
    layer; 0 if all tokens do. ``notes`` state assumptions.
    """

    weights: int
    head: int
    experts: tuple[ExpertWeights, ...]
    layers: tuple[AttentionLayer, ...]
    itemsize: int
    kv_dtype: torch.dtype
    head_keeps_rows: bool
    weight_bytes: float
    last_weights: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def product_weights(self) -> int:
        """The weights of all matrix products but the output layer's and the experts'."""
        return self.weights

    def prefill(self, chunks: Sequence[tuple[int, int]], rows: int) -> StepWork:
        """Return the work of a prefill step of ``chunks``, each (first position, tokens), with logits for ``rows`` tokens.

        Bytes: each weight once, K and V of the new tokens written once, and those attended to read once per chunk.
        Activations are not counted.
        """
        tokens = sum(count for _, count in chunks)
        products = self._products(tokens, rows if self.head_keeps_rows else tokens)
        flops = products.flops - 2 * self.last_weights * (tokens - rows)
        nbytes = products.nbytes
        for number, layer in enumerate(self.layers, 1):
            if self.last_weights and number == len(self.layers):
                flops += sum(_attention_flops(layer, layer.seen_by(start + count - 1)) for start, count in chunks)
            else:
                flops += sum(_attention_flops(layer, layer.pairs(start, count)) for start, count in chunks)
            # the first new token attends furthest back; all positions from there on are read
            read = sum(layer.seen_by(start) - 1 + count for start, count in chunks)
            nbytes += (read + tokens) * self._kv_nbytes(layer)
        return StepWork(flops, nbytes)

    def decode(self, contexts: Sequence[int]) -> StepWork:
        """Return the work of a decode step of one token per request, with ``contexts`` tokens in the KV pool after it.

        Bytes: each weight once, K and V of every token attended to read once, those of the new tokens written once.
        """
        products = self._products(len(contexts), len(contexts))
        flops = products.flops
        nbytes = products.nbytes
        for layer in self.layers:
            seen = sum(layer.seen_by(context - 1) for context in contexts)
            flops += _attention_flops(layer, seen)
            nbytes += (seen + len(contexts)) * self._kv_nbytes(layer)
        return StepWork(flops, nbytes)

    def _kv_nbytes(self, layer: AttentionLayer) -> int:
        """Return the bytes of a token's K and V in the pool."""
        sizes = stored_size(layer.key_dim, self.kv_dtype) + stored_size(layer.value_dim, self.kv_dtype)
        return layer.kv_heads * sizes * self.kv_dtype.itemsize

    def _products(self, tokens: int, rows: int) -> StepWork:
        """Return the work of the matrix products of ``tokens`` tokens: 2 operations per weight and token."""
        active = sum(each.numbers * each.active / each.experts for each in self.experts)
        touched = sum(each.touched(tokens) for each in self.experts)
        return StepWork(
            2 * (self.weights + active) * tokens + 2 * self.head * rows,
            (self.weights + self.head) * self.weight_bytes + touched * self.itemsize,
        )


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Architecture):
    """An encoder-decoder. What every :class:`Architecture` has is here that of the decoder's one token for each request:
    ``layers`` attend to its answer and to its source, so to all that it has in the pool.

    ``source_weights`` counts the weights that every token of a source passes through: the encoder's, and those by which the
    decoder's layers make K and V of the encoder's states. ``encoder`` are the layers that attend within a source.
    """

    source_weights: int
    encoder: tuple[AttentionLayer, ...]

    @property
    def product_weights(self) -> int:
        """See :attr:`Architecture.product_weights`."""
        return self.weights + self.source_weights

    def prefill(self, chunks: Sequence[tuple[int, int]], rows: int) -> StepWork:
        """Return the work of a prefill step of whole sources, each (0, tokens): that of the sources, whose K and V are
        written once, and of the decoder's first token for each."""
        sources = [tokens for _, tokens in chunks]
        first = self.decode([tokens + 1 for tokens in sources])
        pairs = sum(tokens * tokens for tokens in sources)  # each sees all
        attention_flops = sum(_attention_flops(layer, pairs) for layer in self.encoder)
        stored = sum(sources) * sum(map(self._kv_nbytes, self.layers))
        return StepWork(
            first.flops + 2 * self.source_weights * sum(sources) + attention_flops,
            first.nbytes + self.source_weights * self.weight_bytes + stored,
        )


def _attention_flops(layer: AttentionLayer, pairs: int) -> int:
    """Return the operations of scores and weighted values: 4 x head size per position and head if K and V are alike."""
    return 2 * pairs * layer.heads * (layer.key_dim + layer.value_dim)


def _kv_numbers(layer: AttentionLayer) -> int:
    return layer.kv_heads * (layer.key_dim + layer.value_dim)


def count_architecture(model: LoadedModel, kv_dtype: torch.dtype) -> Architecture:
    """Count ``model``, which its :class:`~splitwiser.model.routes.Route` must have attached to the engine, over a pool of
    ``kv_dtype``."""
    module = model.module
    output = module.get_output_embeddings()
    config = module.config.get_text_config()
    active = next((given for name in _ACTIVE_EXPERTS if isinstance(given := getattr(config, name, None), int)), None)
    weights, stacks = _count_weights(module, output)
    head = output.weight.numel() if isinstance(output, nn.Linear | PackedLinear | Int8Linear) else 0
    layers = _probe_attention(model)
    itemsize = model.dtype.itemsize
    weight_bytes = _find_weight_bytes(module, itemsize)
    if model.encodes:
        answer = tuple(layer for layer in layers if layer.mask.is_causal)  # K and V of a source are of the same shape
        source = _count_weights(module.get_encoder(), output)[0] + config.hidden_size * sum(map(_kv_numbers, answer))
        return EncoderDecoder(
            weights=weights - source,
            head=head,
            experts=(),
            layers=answer,
            itemsize=itemsize,
            kv_dtype=kv_dtype,
            head_keeps_rows=True,
            weight_bytes=weight_bytes,
            source_weights=source,
            encoder=tuple(layers[: layers.index(answer[0])]),
        )
    notes = []
    if stacks and active is None:
        notes.append("the configuration does not say how many experts a token uses; all are counted")
    return Architecture(
        weights=weights,
        head=head,
        experts=tuple(ExpertWeights(each.numel(), len(each), active or len(each)) for each in stacks),
        layers=tuple(layers),
        itemsize=itemsize,
        kv_dtype=kv_dtype,
        head_keeps_rows="logits_to_keep" in inspect.signature(type(module).forward).parameters,
        weight_bytes=weight_bytes,
        last_weights=_count_last_weights(module),
        notes=tuple(notes),
    )


def _count_weights(module: nn.Module, output: nn.Module | None) -> tuple[int, list[Tensor]]:
    """Return the number of weights of matrix products within ``module`` but ``output``, and those of all experts of a layer,
    stacked, (experts, ...) each, which are not among them."""
    weights = 0
    stacks: list[Tensor] = []
    for part in module.modules():
        if isinstance(part, nn.Embedding) or part is output:
            continue
        if isinstance(part, PackedLinear | Int8Linear):
            weights += part.weight.numel()
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim < 2 or name.endswith("bias"):
                continue
            if parameter.ndim == 3:
                stacks.append(parameter)
            else:
                weights += parameter.numel()
    return weights, stacks


def _find_weight_bytes(module: nn.Module, itemsize: int) -> float:
    """Return the bytes of a weight of a linear layer within ``module`` on average; of int8 with those of its scales."""
    layers = [each for each in module.modules() if isinstance(each, Int8Linear)]
    if not layers:
        return itemsize * compressed_share(module)
    nbytes = sum(buffer.nbytes for each in layers for buffer in each.buffers())
    return nbytes / sum(each.in_features * each.out_features for each in layers)


def _count_last_weights(module: nn.Module) -> int:
    """Return the number of weights behind the attention of a last layer that computes the ends of prompts alone."""
    lasts = [part for part in module.modules() if isinstance(part, FusedLayer) and part.is_last]
    return sum(_count_weights(part, None)[0] for last in lasts for part in (last.self_attn.o_proj, last.mlp))


class _Probe(AttentionStep):
    """Records the attention of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[AttentionLayer] = []

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Nothing is read from the pool."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        if not isinstance(mask, Mask):
            raise UnsupportedModelError(f"a layer was given {type(mask).__name__} for a mask")
        self.layers.append(AttentionLayer(query.shape[1], key.shape[1], query.shape[3], value.shape[3], mask))
        return attention.attend(query, key, value, None, options).transpose(1, 2)


@torch.inference_mode()
def _probe_attention(model: LoadedModel) -> list[AttentionLayer]:
    """Return every attention of a forward in turn: of an encoder-decoder first the encoder's, then for each layer of the
    decoder that to the answer, whose mask is causal, and that to the source."""
    probe = _Probe()
    run = run_both_halves if model.encodes else run_decoder
    run(model.module, probe, [0])
    return probe.layers
