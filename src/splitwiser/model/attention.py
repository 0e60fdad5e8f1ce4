"""Attention over the KV pool, behind transformers' attention interface.

A model whose attention implementation is :data:`NAME` calls, in each layer and in this order, ``update`` of the cache
object it was given (a :class:`StepAttention`), which writes K and V into the pool, and then :func:`attention_function`,
which attends. Requests are packed one after another in a single row without padding; which tokens belong together is
known to the :class:`StepAttention` alone, and which positions may see each other is asked of the model's own mask
function, so causal, sliding and chunked masks are all served.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from splitwiser.errors import UnsupportedModelError
from splitwiser.model.kv_pool import KVPool

NAME = "splitwiser"

# On Hopper PyTorch prefers cuDNN's attention for half precisions, which makes a plan for each new length of a prompt and of
# its K and V: tenths of a second each. Off for the process, in mode generate too; flash attention then takes its place.
torch.backends.cuda.enable_cudnn_sdp(False)

MaskFunction = Callable[..., Any]  # of transformers: (batch, head, query positions, key positions) -> boolean

# what models hand down to every attention function, of no meaning to the attention itself
# (a window is in the mask already, and so is causality)
_HARMLESS = {"position_ids", "cache_position", "use_cache", "is_causal", "sliding_window"}


@dataclass(frozen=True, eq=False)
class Mask:
    """Stands where a mask tensor would: the model's mask function, to be asked for absolute positions."""

    function: MaskFunction

    @property
    def is_causal(self) -> bool:
        """Whether each position sees itself and all before it, and nothing narrows that."""
        return self.function is causal_mask_function

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which ``keys`` positions each of ``queries`` positions may see: boolean, their broadcast shape."""
        seen: Tensor = self.function(0, 0, queries, keys)
        return seen.expand(torch.broadcast_shapes(queries.shape, keys.shape))


def mask_function_interface(*, mask_function: MaskFunction, **_: object) -> Mask:
    """What transformers calls to build a mask: wraps its ``mask_function`` instead of evaluating it.

    A padding mask among the other arguments is one of ones that the model made for itself: the engine hands in none.
    """
    return Mask(mask_function)


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer's attention asks for beside the mask: the scale of the scores, their soft-cap (``cap * tanh(score /
    cap)``, before the mask) and the heads' sinks (one extra logit a head in the softmax, shape (heads,))."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


class Attends(Protocol):
    """What :func:`attention_function` needs of the step it serves."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """Attend from the step's tokens; shapes as in :func:`attention_function`."""
        ...


_step: ContextVar[Attends] = ContextVar("splitwiser_step")


@contextmanager
def serving(step: Attends) -> Iterator[None]:
    """While this lasts, attention layers called in this thread attend through ``step``."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What a layer calls: ``query`` (1, heads, tokens, head size), ``key`` and ``value`` of this step's tokens.

    Returns (1, tokens, heads, value size). Raises :class:`UnsupportedModelError` on an argument whose meaning is not
    known here, since ignoring it would give wrong tokens.
    """
    asked = sorted(name for name, given in others.items() if name not in _HARMLESS and given not in (None, False))
    if dropout or asked:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention for {', '.join(asked) or 'dropout'}, which the engine cannot serve"
        )
    options = AttentionOptions(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    return _step.get().attend(query, key, value, attention_mask, options), None


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function_interface)


@dataclass(frozen=True)
class Segment:
    """One request's part of a step: ``tokens`` new tokens, after which ``context`` tokens of it lie in ``blocks``."""

    blocks: Sequence[int]
    context: int
    tokens: int

    @property
    def positions(self) -> range:
        """The absolute positions of the new tokens."""
        return range(self.context - self.tokens, self.context)


@dataclass(frozen=True)
class _Group:
    """Requests of a decode step that are read from the pool together: their rows, block tables and lengths."""

    rows: Tensor
    tables: Tensor
    lengths: Tensor


class Place(NamedTuple):
    """Where a layer of a decode step reads and writes: its part of the pool, and what else
    :class:`~splitwiser.model.kernels.interface.AttentionKernel` and
    :class:`~splitwiser.model.kernels.interface.StoreKernel` are given."""

    keys: Tensor
    values: Tensor
    slots: Tensor
    tables: Tensor
    starts: Tensor
    offsets: Tensor
    lengths: Tensor


class StepCache:
    """The methods that models call on ``past_key_values`` beside ``update``: to them, every step starts afresh."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen before, as far as the model needs to know: positions are handed in explicitly."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The first query's index in the mask; masks are asked for absolute positions instead."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys in the mask, as above."""
        return query_length, 0


class StepAttention(StepCache):
    """The attention of one step: where its tokens lie in the pool and which requests they belong to.

    The pool's kernels attend. Without one, PyTorch attends in a decode step (one token a request) in groups of requests of
    similar length, so that little is padded, and in any other step to each request on its own.
    """

    def __init__(self, pool: KVPool, segments: Sequence[Segment], device: torch.device) -> None:
        self.pool = pool
        self.segments = segments
        self.device = device
        size = pool.block_tokens
        slots = [
            segment.blocks[position // size] * size + position % size
            for segment in segments
            for position in segment.positions
        ]
        self._slots = torch.tensor(slots, device=device)
        self._layer = -1
        self._masks: dict[tuple[Mask, int], Tensor] = {}
        self._starts: dict[Mask, Tensor | None] = {}
        self._windows: dict[Mask, int | None] = {}
        self._tables: dict[int, Tensor] = {}
        self._decoding = all(segment.tokens == 1 and segment.context > 1 for segment in segments)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write this step's K and V, each of shape (1, kv_heads, tokens, head size), into the pool's layer."""
        self._layer = layer_idx
        self.pool.write(layer_idx, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """Attend from this step's tokens to all of their own requests' tokens; shapes as in
        :func:`attention_function`."""
        if not isinstance(mask, Mask):
            raise UnsupportedModelError(f"a layer was given {type(mask).__name__} for a mask")
        kernel = self.pool.kernels.decode if self._decoding else self.pool.kernels.prefill
        if kernel and (starts := self._first_seen(mask)) is not None:
            return kernel(
                query[0].transpose(0, 1), self.pool.keys[self._layer], self.pool.values[self._layer], self._batch.tables,
                starts, self._offsets, self._batch.lengths, options.scaling, options.softcap, options.sinks,
            ).unsqueeze(0)  # fmt: skip
        if not self._decoding and (packed := self._attend_packed(query, key, value, mask, options)) is not None:
            return packed.unsqueeze(0)
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        if self._decoding:
            self._attend_groups(query, mask, options, output)
        else:
            self._attend_segments(query, key, value, mask, options, output)
        return output.unsqueeze(0)

    def place(self, layer: int, mask: object) -> Place | None:
        """Where ``layer`` of a decode step reads and writes, for one function that does all of a layer; None in another step
        or where no first position stands for ``mask``."""
        if not self._decoding or not isinstance(mask, Mask) or (starts := self._first_seen(mask)) is None:
            return None
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        return Place(keys, values, self._slots, self._batch.tables, starts, self._offsets, self._batch.lengths)

    def _attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, options: AttentionOptions
    ) -> Tensor | None:
        """Attention of all segments in one call; None where there is no kernel for it, or none that knows what is asked."""
        kernel = self.pool.kernels.packed
        if kernel is None or options.softcap is not None or options.sinks is not None:
            return None
        window = None if mask.is_causal else self._window(mask)
        if window is None and not mask.is_causal:
            return None
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        if self._context_slots is not None:  # some of what is seen came in earlier steps
            keys, values = (
                kept[self._layer].flatten(0, 1).index_select(0, self._context_slots)
                for kept in (self.pool.keys, self.pool.values)
            )
        return kernel(
            query[0].transpose(0, 1), keys, values, self._packed_offsets, self._longest, window, options.scaling
        )

    def _attend_segments(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, options: AttentionOptions, output: Tensor
    ) -> None:
        start = 0
        for number, segment in enumerate(self.segments):
            rows = slice(start, start + segment.tokens)
            start += segment.tokens
            if segment.tokens == segment.context:  # a whole prompt: all it sees is in this step
                keys, values = key[:, :, rows], value[:, :, rows]
            else:
                keys, values = (
                    kept[:, : segment.context].transpose(1, 2)
                    for kept in self.pool.read(self._layer, self._segment_table(number, segment))
                )
            seen = self._segment_mask(number, segment, mask)
            output[rows] = attend(query[:, :, rows], keys, values, seen, options)[0].transpose(0, 1)

    def _attend_groups(self, query: Tensor, mask: Mask, options: AttentionOptions, output: Tensor) -> None:
        for number, group in enumerate(self._groups):
            keys, values = (kept.transpose(1, 2) for kept in self.pool.read(self._layer, group.tables))
            queries = query[0].transpose(0, 1)[group.rows].unsqueeze(2)
            seen = self._group_mask(number, group, keys.shape[2], mask)
            output[group.rows] = attend(queries, keys, values, seen, options).squeeze(2)

    def _segment_table(self, number: int, segment: Segment) -> Tensor:
        """The blocks of a request's context, (1, blocks). Layers share it."""
        if number not in self._tables:
            blocks = segment.blocks[: self.pool.blocks_for(segment.context)]
            self._tables[number] = torch.tensor([blocks], device=self.device)
        return self._tables[number]

    def _segment_mask(self, number: int, segment: Segment, mask: Mask) -> Tensor | None:
        """What a request's new tokens see: boolean (tokens, context), or None where plainly causal. Layers share it."""
        if mask.is_causal and segment.tokens == segment.context:
            return None
        key = (mask, number)
        if key not in self._masks:
            positions = torch.arange(segment.context, device=self.device)
            self._masks[key] = mask(positions[-segment.tokens :, None], positions[None])
        return self._masks[key]

    def _group_mask(self, number: int, group: _Group, padded: int, mask: Mask) -> Tensor:
        """What a group's tokens see: boolean (requests, 1, 1, padded length). Layers share it."""
        key = (mask, number)
        if key not in self._masks:
            positions = torch.arange(padded, device=self.device)[None]
            seen = mask(group.lengths[:, None] - 1, positions) & (positions < group.lengths[:, None])
            self._masks[key] = seen[:, None, None]
        return self._masks[key]

    def _first_seen(self, mask: Mask) -> Tensor | None:
        """The first position that each token sees, if it sees all from there up to itself, as under a causal mask, a window
        or chunks; None for any other mask. Layers share it."""
        if mask not in self._starts:
            own = self._own_positions
            if mask.is_causal:
                self._starts[mask] = torch.zeros_like(own)
            else:
                positions = torch.arange(int(own.max()) + 1, device=self.device)[None]
                seen = mask(own[:, None], positions) & (positions <= own[:, None])
                starts = own + 1 - seen.sum(dim=-1)
                self._starts[mask] = starts if bool((seen.byte().argmax(dim=-1) == starts).all()) else None
        return self._starts[mask]

    def _window(self, mask: Mask) -> int | None:
        """How many tokens each of the step's sees, itself included, if each sees as far back as any other; None for another
        mask. Layers share it."""
        if mask not in self._windows:
            self._windows[mask] = None
            if (starts := self._first_seen(mask)) is not None:
                seen = self._own_positions + 1 - starts
                most = seen.max()
                if bool((seen == torch.minimum(self._own_positions + 1, most)).all()):
                    self._windows[mask] = int(most)
        return self._windows[mask]

    @cached_property
    def _own_positions(self) -> Tensor:
        """The absolute position of each of the step's tokens, (tokens,)."""
        return torch.tensor([at for segment in self.segments for at in segment.positions], device=self.device)

    @cached_property
    def _context_slots(self) -> Tensor | None:
        """The slots of all requests' contexts, one request after the other, (context tokens,); None where each prompt is
        whole in this step, so that its K and V need not be read back."""
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
        """The most new tokens and the longest context of a request."""
        return max(each.tokens for each in self.segments), max(each.context for each in self.segments)

    @cached_property
    def _packed_offsets(self) -> tuple[Tensor, Tensor]:
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
        most = max(self.pool.blocks_for(segment.context) for segment in self.segments)
        return self._group(list(range(len(self.segments))), most)

    @cached_property
    def _groups(self) -> list[_Group]:
        """The requests of a decode step by similar length."""
        needs = [self.pool.blocks_for(segment.context) for segment in self.segments]
        groups: list[list[int]] = []
        for row in sorted(range(len(needs)), key=needs.__getitem__):
            # at most a quarter of a group's reads is padding, or two blocks a request
            if groups and needs[row] <= max(needs[groups[-1][0]] * 1.25, needs[groups[-1][0]] + 2):
                groups[-1].append(row)
            else:
                groups.append([row])
        return [self._group(rows, needs[rows[-1]]) for rows in groups]

    def _group(self, rows: list[int], most: int) -> _Group:
        tables = [[*self.segments[row].blocks[:most], *[0] * (most - len(self.segments[row].blocks))] for row in rows]
        return _Group(
            torch.tensor(rows, device=self.device),
            torch.tensor(tables, device=self.device),
            torch.tensor([self.segments[row].context for row in rows], device=self.device),
        )


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, options: AttentionOptions) -> Tensor:
    """Attention of ``query`` (n, heads, q, head size) over ``key`` and ``value`` (n, kv_heads, k, head size).

    ``seen`` is boolean, broadcastable to (n, heads, q, k); None is causal with q = k. Heads share K and V in groups where
    there are fewer ``kv_heads``. Returns (n, heads, q, value size).
    """
    if options.softcap is None and options.sinks is None and not _written_out(query):
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, scale=options.scaling, enable_gqa=grouped
        )
    if seen is None:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    count, heads, queries, _ = query.shape
    query = query.unflatten(1, (key.shape[1], heads // key.shape[1]))
    scores = torch.einsum("nhgqd,nhkd->nhgqk", query, key).flatten(1, 2).float() * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, heads, 1, 1).expand(count, heads, queries, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype).unflatten(1, (key.shape[1], -1))
    return torch.einsum("nhgqk,nhkd->nhgqd", weights, value).flatten(1, 2)


def _written_out(query: Tensor) -> bool:
    """Whether the products written out are faster than PyTorch's fused function: with one query a request in a half
    precision on a CPU, they take a third of its time."""
    return query.device.type == "cpu" and query.shape[2] == 1 and query.dtype != torch.float32
