"""Attention of one step over the paged KV pool, by the pool's kernels or by PyTorch."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from splitwiser.errors import UnsupportedModelError
from splitwiser.model.attention import AttentionOptions, AttentionStep, Mask, attend
from splitwiser.model.kv_pool import KVPool


@dataclass(frozen=True)
class Segment:
    """One request's part of a step: ``tokens`` new tokens, with which its first ``context`` tokens lie in ``blocks``. The
    first ``prompt`` of all its tokens are its prompt, by default the whole context. ``lora`` is the number of the LoRA
    adapter that they run with, 0 for none. The new tokens attend to those from number ``first`` on: with an encoder-decoder,
    the source's come before."""

    blocks: Sequence[int]
    context: int
    tokens: int
    prompt: int = 0
    lora: int = 0
    first: int = 0

    @property
    def places(self) -> range:
        """The numbers of the new tokens among all of the request's."""
        return range(self.context - self.tokens, self.context)

    @property
    def positions(self) -> range:
        """The positions of the new tokens, which count from ``first``."""
        return range(self.places.start - self.first, self.places.stop - self.first)


@dataclass(frozen=True)
class _Group:
    """Requests of a decode step that are read from the pool together: their rows in the step, block tables and lengths."""

    rows: Tensor
    tables: Tensor
    lengths: Tensor


class KernelInputs(NamedTuple):
    """The inputs of the store and attention kernels at some layers of a decode step, as
    :class:`~splitwiser.model.kernels.interface.StoreKernel` and
    :class:`~splitwiser.model.kernels.interface.AttentionKernel` describe them: the layers of the pool, and which of their
    slots belong to which request."""

    keys: list[Tensor]
    values: list[Tensor]
    slots: Tensor
    tables: Tensor
    starts: Tensor
    offsets: Tensor
    lengths: Tensor


class ComputedAhead(NamedTuple):
    """The output of a layer that was computed before the model called it, and the inputs that it holds for."""

    inputs: tuple[object, ...]
    output: Tensor


@dataclass
class LayerLoop:
    """A model's loop over its layers: how many returned what was computed ahead, and whether all is computed."""

    answers: int = 0
    is_done: bool = False


def find_slots(pool: KVPool, segments: Sequence[Segment], device: torch.device) -> Tensor:
    """Return the slots of the new tokens of ``segments``, one after another: int64 of shape (tokens,)."""
    size = pool.block_tokens
    slots = [each.blocks[place // size] * size + place % size for each in segments for place in each.places]
    return torch.tensor(slots, device=device)


def find_loras(segments: Sequence[Segment], device: torch.device) -> Tensor | None:
    """Return the number of the LoRA adapter of each new token of ``segments``; see
    :attr:`~splitwiser.model.attention.AttentionStep.loras`."""
    if not any(segment.lora for segment in segments):
        return None
    return torch.tensor([segment.lora for segment in segments for _ in segment.places], device=device)


class PagedAttention(AttentionStep):
    """The attention of one step: where its tokens lie in the pool and which requests they belong to.

    The pool's kernels attend where it has them. Otherwise PyTorch attends: in a decode step (one token per request) to
    groups of requests of similar length, so that there is little padding, and in any other step to each request separately.
    Tensors that layers share are made once per step.
    """

    def __init__(self, pool: KVPool, segments: Sequence[Segment], device: torch.device) -> None:
        super().__init__()
        self.pool = pool
        self.segments = segments
        self.device = device
        self.computed_ahead: dict[int, ComputedAhead] = {}  # by layer
        self.loop: LayerLoop | None = None  # that the model is in
        self._layer = -1  # whose K and V the running attention is over
        self._masks: dict[tuple[Mask, int], Tensor] = {}
        self._starts: dict[Mask, Tensor | None] = {}
        self._windows: dict[Mask, int | None] = {}
        self._tables: dict[int, Tensor] = {}
        self._decoding = all(segment.tokens == 1 and segment.context > 1 for segment in segments)

    @cached_property
    def _slots(self) -> Tensor:
        """The slots of the step's tokens, (tokens,)."""
        return find_slots(self.pool, self.segments, self.device)

    @cached_property
    def loras(self) -> Tensor | None:
        """See :attr:`~splitwiser.model.attention.AttentionStep.loras`."""
        return find_loras(self.segments, self.device)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See :meth:`~splitwiser.model.attention.AttentionStep.store`; writes into the pool's layer."""
        self.pool.write(layer, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))

    def lengths(self, positions: Tensor) -> Tensor:
        """See :meth:`~splitwiser.model.attention.AttentionStep.lengths`; a prompt that is split over steps counts whole in
        each, and a token after it has the length that the request had when the token was its last."""
        lengths = [max(at + 1, each.prompt or each.context) for each in self.segments for at in each.places]
        return torch.tensor(lengths, device=self.device).view_as(positions)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """See :meth:`~splitwiser.model.attention.AttentionStep.attend`. Raises :class:`UnsupportedModelError` if ``mask`` is
        not a :class:`~splitwiser.model.attention.Mask`."""
        if not isinstance(mask, Mask):
            raise UnsupportedModelError(f"a layer was given {type(mask).__name__} for a mask")
        return self.attend_at(self.attended_layer(key), query, key, value, mask, options)

    def attend_at(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Mask, options: AttentionOptions
    ) -> Tensor:
        """Attend over the stored K and V of ``layer``; otherwise as
        :meth:`~splitwiser.model.attention.AttentionStep.attend`."""
        self._layer = layer
        kernel = self.pool.kernels.decode if self._decoding else self.pool.kernels.prefill
        if kernel and options.expand is None and (starts := self._first_seen(mask)) is not None:
            return kernel(
                query[0].transpose(0, 1).to(self.pool.query_dtype), self.pool.keys[self._layer],
                self.pool.values[self._layer], self._batch.tables, starts, self._offsets, self._batch.lengths,
                options.scaling, options.softcap, options.sinks, options.bias, options.bias_by_position,
            ).to(query.dtype).unsqueeze(0)  # fmt: skip
        if not self._decoding and (output := self._attend_varlen(query, key, value, mask, options)) is not None:
            return output.unsqueeze(0)
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        if self._decoding:
            self._attend_groups(query, mask, options, output)
        else:
            self._attend_segments(query, key, value, mask, options, output)
        return output.unsqueeze(0)

    def at_rows(self, rows: Tensor) -> "PagedAttention":
        """Return the attention of those of the step's tokens whose numbers are ``rows``, over K and V stored before."""
        tokens = [(segment, place) for segment in self.segments for place in segment.places]
        wanted = [tokens[row] for row in rows.tolist()]
        segments = [replace(segment, context=place + 1, tokens=1) for segment, place in wanted]
        return PagedAttention(self.pool, segments, self.device)

    def kernel_inputs(self, layers: Sequence[int], mask: object) -> KernelInputs | None:
        """Return the kernels' inputs at ``layers`` of a decode step, for a function that computes whole layers; None in
        another step, or if the first visible position does not describe ``mask``."""
        if not self._decoding or not isinstance(mask, Mask) or (starts := self._first_seen(mask)) is None:
            return None
        keys, values = ([part[layer] for layer in layers] for part in (self.pool.keys, self.pool.values))
        return KernelInputs(keys, values, self._slots, self._batch.tables, starts, self._offsets, self._batch.lengths)

    def _attend_varlen(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, options: AttentionOptions
    ) -> Tensor | None:
        """Attend from all segments in one call; None without a kernel for it, or if it does not support ``mask`` or
        ``options``."""
        kernel = self.pool.kernels.varlen
        if kernel is None or not options.fits_varlen:
            return None
        window = None if mask.is_causal else self._window(mask)
        if window is None and not mask.is_causal:
            return None
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        if self._context_slots is not None:  # earlier steps computed part of the contexts
            if options.expand is not None:
                return None
            keys, values = (
                stored[self._layer].flatten(0, 1).index_select(0, self._context_slots)
                for stored in (self.pool.keys, self.pool.values)
            )
        return kernel(
            query[0].transpose(0, 1), keys, values, self._varlen_offsets, self._longest, window, options.scaling
        )

    def _attend_segments(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, options: AttentionOptions, output: Tensor
    ) -> None:
        start = 0
        for number, segment in enumerate(self.segments):
            rows = slice(start, start + segment.tokens)
            start += segment.tokens
            # of a whole prompt, K and V are all in this step; where they are stored rounded, they are so for all steps
            if segment.tokens == segment.context and self.pool.dtype == key.dtype:
                keys, values = key[:, :, rows], value[:, :, rows]
            else:
                table = self._segment_table(number, segment)
                keys, values = self._read(table, options, query.dtype, segment.context)
            seen = self._segment_mask(number, segment, mask)
            positions = None if options.bias is None else self._segment_positions(segment)
            output[rows] = attend(query[:, :, rows], keys, values, seen, options, positions)[0].transpose(0, 1)

    def _attend_groups(self, query: Tensor, mask: Mask, options: AttentionOptions, output: Tensor) -> None:
        for number, group in enumerate(self._groups):
            keys, values = self._read(group.tables, options, query.dtype)
            queries = query[0].transpose(0, 1)[group.rows].unsqueeze(2)
            seen = self._group_mask(number, group, keys.shape[2], mask)
            positions = None if options.bias is None else self._group_positions(group, keys.shape[2])
            output[group.rows] = attend(queries, keys, values, seen, options, positions).squeeze(2)

    def _read(
        self, tables: Tensor, options: AttentionOptions, dtype: torch.dtype, tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of the blocks in ``tables`` (n, blocks), or of their first ``tokens`` tokens, in ``dtype``: (n,
        kv_heads, tokens, head size) each."""
        keys, values = (read[:, :tokens].transpose(1, 2).to(dtype) for read in self.pool.read(self._layer, tables))
        return options.expanded(keys, values)

    def _segment_table(self, number: int, segment: Segment) -> Tensor:
        """Return the block table of a request's context, (1, blocks)."""
        if number not in self._tables:
            blocks = segment.blocks[: self.pool.blocks_for(segment.context)]
            self._tables[number] = torch.tensor([blocks], device=self.device)
        return self._tables[number]

    def _segment_mask(self, number: int, segment: Segment, mask: Mask) -> Tensor | None:
        """Return what a request's new tokens see: boolean (tokens, context), or None for a causal mask over a whole
        prompt."""
        if mask.is_causal and segment.tokens == segment.context:
            return None
        key = (mask, number)
        if key not in self._masks:
            positions = torch.arange(segment.context, device=self.device)
            self._masks[key] = mask(positions[-segment.tokens :, None], positions[None])
        return self._masks[key]

    def _group_mask(self, number: int, group: _Group, padded: int, mask: Mask) -> Tensor:
        """Return what a group's tokens see: boolean (requests, 1, 1, padded length)."""
        key = (mask, number)
        if key not in self._masks:
            positions = torch.arange(padded, device=self.device)[None]
            seen = mask(group.lengths[:, None] - 1, positions) & (positions < group.lengths[:, None])
            self._masks[key] = (seen & (positions >= self._firsts[group.rows, None]))[:, None, None]
        return self._masks[key]

    def _segment_positions(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """Return the positions of a request's new tokens and of its context, (1, tokens, 1) and (1, 1, context)."""
        context = torch.arange(segment.context, device=self.device)
        return context[None, -segment.tokens :, None], context[None, None]

    def _group_positions(self, group: _Group, padded: int) -> tuple[Tensor, Tensor]:
        """Return the positions of a group's tokens and of what they see, (requests, 1, 1) and (1, 1, padded length)."""
        return group.lengths[:, None, None] - 1, torch.arange(padded, device=self.device)[None, None]

    def _first_seen(self, mask: Mask) -> Tensor | None:
        """See :func:`first_seen`; of the step's tokens, once for all layers."""
        if mask not in self._starts:
            self._starts[mask] = self._firsts if mask.is_causal else first_seen(mask, self._own_positions)
        return self._starts[mask]

    def _window(self, mask: Mask) -> int | None:
        """See :func:`window_of`; of the step's tokens, once for all layers."""
        if mask not in self._windows:
            starts = self._first_seen(mask)
            self._windows[mask] = None if starts is None else window_of(starts, self._own_positions)
        return self._windows[mask]

    @cached_property
    def _own_positions(self) -> Tensor:
        """The absolute position of each of the step's tokens, (tokens,)."""
        return torch.tensor([at for segment in self.segments for at in segment.places], device=self.device)

    @cached_property
    def _firsts(self) -> Tensor:
        """The first place that each of the step's tokens may see, (tokens,)."""
        return torch.tensor([each.first for each in self.segments for _ in each.places], device=self.device)

    @cached_property
    def _context_slots(self) -> Tensor | None:
        """The slots of all requests' contexts, one request after the other, (context tokens,); None if each prompt is whole
        in this step, so that its K and V need not be read from the pool."""
        if all(segment.tokens == segment.context for segment in self.segments):
            return None
        size = self.pool.block_tokens
        slots = [
            (torch.tensor(segment.blocks)[:, None] * size + torch.arange(size)).flatten()[: segment.context]
            for segment in self.segments
        ]
        return torch.cat(slots).to(self.device)

    @cached_property
    def _longest(self) -> tuple[int, int]:
        """The largest number of new tokens and the longest context of a request."""
        return max(each.tokens for each in self.segments), max(each.context for each in self.segments)

    @cached_property
    def _varlen_offsets(self) -> tuple[Tensor, Tensor]:
        """Where each request's new tokens and its context begin among all, (requests + 1,) and int32 each."""
        tokens, contexts = (
            torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=self.device)
            for counts in ([each.tokens for each in self.segments], [each.context for each in self.segments])
        )
        return tokens, contexts

    @cached_property
    def _offsets(self) -> Tensor:
        """Where each request's tokens begin in the step, (requests + 1,)."""
        return torch.tensor([0, *itertools.accumulate(segment.tokens for segment in self.segments)], device=self.device)

    @cached_property
    def _batch(self) -> _Group:
        """All requests, in their order."""
        longest = max(self.pool.blocks_for(segment.context) for segment in self.segments)
        return self._group(list(range(len(self.segments))), longest)

    @cached_property
    def _groups(self) -> list[_Group]:
        """The requests of a decode step, grouped by similar length."""
        needs = [self.pool.blocks_for(segment.context) for segment in self.segments]
        groups: list[list[int]] = []
        for row in sorted(range(len(needs)), key=needs.__getitem__):
            # at most a quarter of a group's reads is padding, or two blocks per request
            if groups and needs[row] <= max(needs[groups[-1][0]] * 1.25, needs[groups[-1][0]] + 2):
                groups[-1].append(row)
            else:
                groups.append([row])
        return [self._group(rows, needs[rows[-1]]) for rows in groups]

    def _group(self, rows: list[int], width: int) -> _Group:
        """Return the requests of ``rows`` with block tables of ``width`` blocks."""
        tables = [[*self.segments[row].blocks[:width], *[0] * (width - len(self.segments[row].blocks))] for row in rows]
        return _Group(
            torch.tensor(rows, device=self.device),
            torch.tensor(tables, device=self.device),
            torch.tensor([self.segments[row].context for row in rows], device=self.device),
        )


class HybridAttention(PagedAttention):
    """The attention of a hybrid step: its first tokens, of ``chunks``, attend as those of a prefill step, and the last ones,
    of ``decoding``, as those of a decode step. K and V of all are stored before any of them attends."""

    def __init__(
        self, pool: KVPool, chunks: Sequence[Segment], decoding: Sequence[Segment], device: torch.device
    ) -> None:
        super().__init__(pool, [*chunks, *decoding], device)
        self._split = sum(segment.tokens for segment in chunks)
        self._parts = PagedAttention(pool, chunks, device), PagedAttention(pool, decoding, device)

    def attend_at(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Mask, options: AttentionOptions
    ) -> Tensor:
        """See :meth:`PagedAttention.attend_at`."""
        if self._decoding:  # each chunk is of one token
            return super().attend_at(layer, query, key, value, mask, options)
        parts = zip(
            self._parts, *(each.tensor_split((self._split,), dim=2) for each in (query, key, value)), strict=True
        )
        return torch.cat([part.attend_at(layer, *tensors, mask, options) for part, *tensors in parts], dim=1)


def first_seen(mask: Mask, positions: Tensor) -> Tensor | None:
    """Return the first position that each token sees, if it sees all positions from there up to its own, as with a causal
    mask, a window or chunks; None for any other mask. ``positions`` are the tokens' own, (tokens,), as is the result."""
    if mask.is_causal:
        return torch.zeros_like(positions)
    keys = torch.arange(int(positions.max()) + 1, device=positions.device)[None]
    seen = mask(positions[:, None], keys) & (keys <= positions[:, None])
    starts = positions + 1 - seen.sum(dim=-1)
    return starts if bool((seen.byte().argmax(dim=-1) == starts).all()) else None


def window_of(starts: Tensor, positions: Tensor) -> int | None:
    """Return how many tokens each token sees, itself included, if tokens at ``positions`` (tokens,) that see all from
    ``starts`` (tokens,) on see through a sliding window; None otherwise."""
    seen = positions + 1 - starts
    most = seen.max()
    return int(most) if bool((seen == torch.minimum(positions + 1, most)).all()) else None
