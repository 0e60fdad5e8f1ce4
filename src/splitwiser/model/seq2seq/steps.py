"""The attention of an encoder-decoder's two halves in a step.

A request has one row of tokens in the pool: first its source, of which every decoder layer stores the K and V that its
cross-attention reads, and right behind it the answer, with the K and V of the decoder's self-attention. So a layer of the
pool holds both, and a request one list of blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import EncoderDecoderCache
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from splitwiser.errors import UnsupportedModelError
from splitwiser.model.attention import AttentionOptions, AttentionStep, Mask
from splitwiser.model.fixed_step import FixedDecodeStep
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.paged_attention import PagedAttention, Segment, find_loras, find_slots

_CAUSAL = Mask(causal_mask_function)
_SCORES_AT_ONCE = 2**24  # numbers: those of a long source would take gigabytes


def is_bidirectional(mask: object) -> bool:
    """Return whether ``mask`` lets every position see every other."""
    return isinstance(mask, Mask) and mask.function is bidirectional_mask_function


class PackedStep(AttentionStep):
    """A step whose tokens are at ``positions`` of their sources or answers, int64 of shape (tokens,)."""

    positions: Tensor


class EncoderStep(PackedStep):
    """The attention of an encoder over packed sources of ``lengths`` tokens: each token sees all of its own source.

    Nothing is stored: the encoder's K and V are of no use once its states are computed. ``loras`` are the numbers of the
    tokens' adapters.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, loras: Tensor | None = None) -> None:
        super().__init__()
        self._loras = loras
        self.positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        self._lengths = lengths
        self._device = device
        self._table: Tensor | None = None  # the current layer's bias, and what it is for sources of these lengths
        self._biases: dict[int, Tensor] = {}

    @property
    def loras(self) -> Tensor | None:
        """See :attr:`~splitwiser.model.attention.AttentionStep.loras`."""
        return self._loras

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See :meth:`~splitwiser.model.attention.AttentionStep.store`; nothing is kept."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """See :meth:`~splitwiser.model.attention.AttentionStep.attend`; ``options.bias`` is by signed distance. Raises
        :class:`UnsupportedModelError` if a token is to see less than its source, or with a soft-cap or sinks."""
        if not is_bidirectional(mask):
            raise UnsupportedModelError("a layer of the encoder does not see the whole source")
        if options.softcap is not None or options.sinks is not None:
            raise UnsupportedModelError("a layer of the encoder attends with a soft-cap or sinks")
        if options.bias is not self._table:
            self._table, self._biases = options.bias, {}
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        start = 0
        for length in self._lengths:
            rows = slice(start, start + length)
            start += length
            made = self._attend_source(query[:, :, rows], key[:, :, rows], value[:, :, rows], options.scaling)
            output[:, rows] = made.transpose(1, 2)
        return output

    def _attend_source(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend within one source, (1, heads, tokens, head size) each; with a bias, from so few rows at a time that the
        biases take little memory."""
        heads, tokens = query.shape[1:3]
        grouped = heads != key.shape[1]
        if self._table is None:
            return scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=grouped)
        rows = max(1, _SCORES_AT_ONCE // (heads * tokens))
        outputs = []
        for start in range(0, tokens, rows):
            part = query[:, :, start : start + rows]
            bias = self._bias(self._table, start, part.shape[2], tokens, query.dtype)
            outputs.append(scaled_dot_product_attention(part, key, value, bias, scale=scaling, enable_gqa=grouped))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _bias(self, table: Tensor, start: int, rows: int, tokens: int, dtype: torch.dtype) -> Tensor:
        """Return the bias of ``rows`` tokens from ``start`` on over a source of ``tokens`` tokens, (1, heads, rows, tokens).
        That of a whole source is kept, for the layers that share a table."""
        if (known := self._biases.get(tokens)) is not None:
            return known
        places = torch.arange(tokens, device=self._device)
        most = table.shape[1] // 2
        distances = (places[None] - places[start : start + rows, None]).clamp(-most, most) + most
        bias = table.to(dtype)[:, distances][None]
        if rows == tokens:
            self._biases[tokens] = bias
        return bias


class SourceCache(AttentionStep):
    """The part of a :class:`DecoderStep` that attends to the sources, whose K and V lie in ``pool``. Its ``loras`` are those
    of the sources' tokens, where these are stored."""

    pool: KVPool

    @property
    def layers(self) -> "SourceCache":
        """The layers whose K and V are stored, by number; the model passes what it finds there to the attention."""
        return self

    def __getitem__(self, layer: int) -> "_Stored":
        self._last_stored = layer
        # attention reads the pool itself: what is passed only has to have the shape of K and V
        shape, stored = self.pool.layers[layer], self.pool.keys[layer]
        keys, values = (stored.new_empty(1, shape.kv_heads, 1, size) for size in (shape.key_dim, shape.value_dim))
        return _Stored(keys, values)


class _Stored(NamedTuple):
    keys: Tensor
    values: Tensor


class DecoderStep(EncoderDecoderCache, PackedStep):  # type: ignore[misc]  # transformers asks for its own class of cache
    """The attention of a decoder over one token of each request: over the ``answer`` and over the ``source``.

    With ``stores_sources`` the model is given the encoder's states, and the K and V that each layer makes of them are
    stored; otherwise it reads those that an earlier step has stored.
    """

    def __init__(
        self, answer: AttentionStep, source: SourceCache, positions: Tensor, *, stores_sources: bool = False
    ) -> None:
        PackedStep.__init__(self)  # not EncoderDecoderCache's own, which takes caches of transformers alone
        self.positions = positions
        self._answer, self._source = answer, source
        self.self_attention_cache, self.cross_attention_cache = answer, source  # type: ignore[assignment]
        self.is_updated = {} if stores_sources else dict.fromkeys(range(len(source.pool.keys)), True)

    @property
    def loras(self) -> Tensor | None:
        """See :attr:`~splitwiser.model.attention.AttentionStep.loras`: those of the answers' tokens."""
        return self._answer.loras

    def loras_of(self, rows: int) -> Tensor | None:
        """See :meth:`~splitwiser.model.attention.AttentionStep.loras_of`. A layer is given the answers' tokens or, to make K
        and V of them, the states of all sources; if these are as many, each source has one token, and both are the same."""
        sources = self._source.loras
        return sources if sources is not None and rows == len(sources) else super().loras_of(rows)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See :meth:`~splitwiser.model.attention.AttentionStep.store`; the model asks the parts to."""
        self._answer.store(layer, key, value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """See :meth:`~splitwiser.model.attention.AttentionStep.attend`. Raises the error of :func:`is_view_of_source`."""
        part = self._source if is_view_of_source(mask) else self._answer
        return part.attend(query, key, value, mask, options)


def is_view_of_source(mask: object) -> bool:
    """Return whether a layer of a decoder attends to the source, rather than to the answer. Raises
    :class:`UnsupportedModelError` for a mask of another kind."""
    if is_bidirectional(mask):
        return True
    if isinstance(mask, Mask) and mask.is_causal:
        return False
    raise UnsupportedModelError("a layer of the decoder does not see all earlier tokens")


def paged_step(pool: KVPool, segments: Sequence[Segment], device: torch.device, *, stores_sources: bool) -> DecoderStep:
    """Return the step of one token of each of ``segments``, which begin behind their sources."""
    positions = torch.tensor([at for segment in segments for at in segment.positions], device=device)
    answer, source = PagedAttention(pool, segments, device), _PagedSources(pool, segments, device, stores_sources)
    return DecoderStep(answer, source, positions, stores_sources=stores_sources)


class _PagedSources(SourceCache, PagedAttention):
    """The attention of one step's tokens over the sources: as in a decode step in which each source's last token is the new
    one, so that it sees the whole source."""

    def __init__(self, pool: KVPool, segments: Sequence[Segment], device: torch.device, stores: bool) -> None:
        PagedAttention.__init__(self, pool, [Segment(each.blocks, each.first, 1) for each in segments], device)
        self._decoding = True  # sources of one token too
        if stores:
            whole = [Segment(each.blocks, each.first, each.first, lora=each.lora) for each in segments]
            self._slots, self.loras = find_slots(pool, whole, device), find_loras(whole, device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """See :meth:`~splitwiser.model.attention.AttentionStep.attend`."""
        return super().attend(query, key, value, _CAUSAL, options)


class FixedSources(SourceCache):
    """The attention of a fixed step's tokens over the sources."""

    def __init__(self, step: FixedDecodeStep) -> None:
        super().__init__()
        self.pool = step.pool
        self._step = step
        self._starts = torch.zeros_like(step.firsts)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See :meth:`~splitwiser.model.attention.AttentionStep.store`; the sources are stored already."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """See :meth:`~splitwiser.model.attention.AttentionStep.attend`."""
        return self._step.attend_between(query, self.attended_layer(key), self._starts, self._step.firsts, options)
