"""Attaches the engine to a decoder, or refuses it with the reason if the engine cannot serve it exactly."""

import sys
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import DynamicCache

from splitwiser.errors import UnsupportedModelError
from splitwiser.model import attach as attach_module
from splitwiser.model import attention
from splitwiser.model.attach import Attachment, Comparison, attach, cannot_be_served
from splitwiser.model.attention import AttentionOptions, AttentionStep, Mask, StepCache
from splitwiser.model.dispatch.alibi import alibi_from, has_alibi
from splitwiser.model.dispatch.table import RECURRENT, dispatch_attention, find_dispatch_problem
from splitwiser.model.forward import cache_argument, forward
from splitwiser.model.fusing import run_decoder
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import PagedAttention, Segment
from splitwiser.model.rotary import depends_on_length, serve_lengths
from splitwiser.model.trials import BOUNDS, FAR_BOUNDS, PADDED_BOUNDS, agree, padding_keeps_logits, probe_prompts

# what a model asks of its cache beside K and V, by a part of the method's name
_INDEXED = "keeps an index of all tokens, by which it chooses those that it attends to, which the engine cannot serve"
_UNSERVED_STATE = {"conv_state": RECURRENT, "recurrent_state": RECURRENT, "indexer": _INDEXED}
_FAR = 2**17  # the last position that is tried if a model has no limit


def attach_engine(model: LoadedModel, *, pack: bool = False, remember: bool = False) -> list[LayerShape]:
    """Make ``model``, a decoder, attend through the KV pool; see :func:`splitwiser.model.attach.attach`, whose arguments and
    result these are.

    Raises :class:`UnsupportedModelError` with the reason unless the engine is shown to serve the model exactly: the class
    must dispatch its attention through transformers' interface, or through a module of
    :mod:`splitwiser.model.dispatch`; in a forward each layer must store K and V and then attend
    exactly once, with a causal mask; and prompts packed in one row must give the logits that the model's own attention gives
    for each alone, at the first positions and up to the last that the model supports.
    """
    return attach(_DECODER, model, pack=pack, remember=remember)


def try_kernels(
    model: LoadedModel, layers: Sequence[LayerShape], kernels: PoolKernels, block_tokens: int
) -> dict[str, str]:
    """See :func:`splitwiser.model.attach.try_kernels`."""
    return attach_module.try_kernels(_DECODER, model, layers, kernels, block_tokens)


def _compare(model: LoadedModel) -> list[Comparison]:
    prompts = probe_prompts(model)
    starts = _probe_starts(model, len(prompts[0]))
    own = [_own_logits(model, prompt) for prompt in prompts]
    far = [_own_logits(model, prompts[0], start, start) for start in starts]
    return [
        Comparison("two packed prompts", own, lambda layers: _served_logits(model, layers, prompts), BOUNDS),
        Comparison(
            "at later positions packed prompts", far, lambda _: _far_logits(model, prompts[0], starts), FAR_BOUNDS
        ),
    ]


def _explain(error: Exception) -> str:
    """Return why a model cannot be served whose forward raised ``error``, to follow its name."""
    if isinstance(error, AttributeError) and isinstance(error.obj, StepCache):
        return next(
            (why for part, why in _UNSERVED_STATE.items() if part in str(error.name)),
            f"asks its cache for {error.name}, which the engine's does not have",
        )
    return cannot_be_served(error)


def _replace_attention(model: LoadedModel) -> None:
    dispatch_attention(model.module)
    serve_lengths(model.module)


@torch.inference_mode()
def padding_changes_tokens(model: LoadedModel) -> bool:
    """Return whether prompts of different lengths in one batch, padded on the left as in mode ``generate``, may give other
    tokens than each alone. False only if two prompts are shown to give the same logits, and the model to compute by the
    positions it is given, however many tokens its cache counts, and no row's length to change another row."""
    if depends_on_length(model.module):
        return True
    lengths = [5, min(12, (model.max_positions or sys.maxsize) - 1)]
    prompts = [[(7 * number + 3) % model.vocabulary for number in range(length)] for length in lengths]
    start = _probe_starts(model, lengths[0])[-1]
    try:
        near, far = (_own_logits(model, prompts[0], 0, counted) for counted in (0, start))
        return not (padding_keeps_logits(model, prompts) and agree([near], [far], PADDED_BOUNDS[model.dtype]))
    except Exception:  # any error of the model's forward: nothing is shown
        return True


class _LayerProbe(AttentionStep):
    """Takes the place of the pool in one forward and records what each layer does. ``windows`` are the numbers of tokens
    that transformers' own cache keeps of each layer, None for all."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__()
        self._windows = windows
        self.stored: dict[int, LayerShape] = {}
        self.events: list[tuple[str, int]] = []

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.events.append(("stores", layer))
        self.stored[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        layer = self.attended_layer(key)
        self.events.append(("attends", layer))
        if not isinstance(mask, Mask):
            raise UnsupportedModelError("a layer attends without the model's mask")
        first = torch.zeros((), dtype=torch.long, device=query.device)
        if bool(mask(first, first + 1)):
            raise UnsupportedModelError("a layer's attention looks at later tokens")
        window = self._windows[layer] if layer < len(self._windows) else None
        if window and bool(mask(first + window, first)):
            raise UnsupportedModelError(
                f"a layer has a window of {window} tokens in the cache alone, and its mask shows earlier ones"
            )
        return attention.attend(query, key, value, None, options).transpose(1, 2)


class _CountingCache(StepCache):
    """A cache that claims to hold ``start`` tokens but holds none: with it, the model's own attention computes a prompt at
    later positions."""

    def __init__(self, start: int) -> None:
        self._start = start

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, self._start

    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return key, value

    # what state-space models call instead

    def get_conv_state(self, *_: object, **__: object) -> None:
        return None

    def get_recurrent_state(self, *_: object, **__: object) -> None:
        return None

    def update_conv_state(self, states: Tensor, *_: object, **__: object) -> Tensor:
        return states

    def update_recurrent_state(self, states: Tensor, *_: object, **__: object) -> Tensor:
        return states


class _PositionedPrompts(AttentionStep):
    """Takes the place of the pool for prompts at later positions, packed in one row: each sees its own tokens of this and
    earlier steps, and nothing before its start. The prompts end at ``lengths``, (prompts,)."""

    def __init__(self, device: torch.device, lengths: Tensor) -> None:
        super().__init__()
        self._lengths = lengths
        self._positions = torch.empty(0, dtype=torch.long, device=device)
        self._owners = self._positions
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self, positions: Tensor, owners: Tensor) -> None:
        """Begin a step: its tokens are at ``positions`` of the prompts ``owners``, (tokens,) each."""
        self._positions = torch.cat([self._positions, positions])
        self._owners = torch.cat([self._owners, owners])

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        if before := self._stored.get(layer):
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        self._stored[layer] = key, value

    def lengths(self, positions: Tensor) -> Tensor:
        return self._lengths[self._owners[-positions.shape[1] :]].view_as(positions)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        assert isinstance(mask, Mask)
        new = slice(-query.shape[2], None)
        positions, owners = self._positions[new, None], self._owners[new, None]
        seen = (owners == self._owners) & (self._positions <= positions) & mask(positions, self._positions[None])
        stored = options.expanded(*self._stored[self.attended_layer(key)])
        return attention.attend(
            query, *stored, seen, options, (positions[None], self._positions[None, None])
        ).transpose(1, 2)


def _probe_layers(model: LoadedModel) -> list[LayerShape]:
    prompt = probe_prompts(model)[0]
    own_cache = DynamicCache(config=model.module.config.get_text_config())
    probe = _LayerProbe([getattr(layer, "sliding_window", None) for layer in own_cache.layers])
    forward(model.module, probe, prompt, range(len(prompt)), [len(prompt) - 1])
    layers = model.module.config.get_text_config().num_hidden_layers
    stored = [layer for event, layer in probe.events if event == "stores"]
    attentions = len(probe.events) - len(stored)
    attends_next = all(
        ("attends", layer) == after
        for (event, layer), after in pairwise([*probe.events, ("ends", -1)])
        if event == "stores"
    )
    if stored != list(range(len(stored))) or attentions != layers or not attends_next:
        raise UnsupportedModelError(
            f"in a forward of its {layers} layers, K and V are stored {len(stored)} times and attended to {attentions} "
            "times, where each layer must attend once, to those that it has just stored or that an earlier layer has"
        )
    return [probe.stored[layer] for layer in stored]


def _probe_starts(model: LoadedModel, tokens: int) -> list[int]:
    """Return the start positions at which prompts of ``tokens`` tokens are tried: the first, half-way and the last."""
    last = max(0, (model.max_positions or _FAR) - tokens)
    return [0, last // 2, last]


def _own_logits(model: LoadedModel, prompt: list[int], start: int = 0, counted: int | None = None) -> Tensor:
    """Return the logits after ``prompt`` at the positions from ``start`` on, by the model's own attention, float32 of shape
    (vocabulary,); with a cache that claims to hold ``counted`` tokens, or without one."""
    ids = torch.tensor([prompt], device=model.device)
    if has_alibi(model.module):  # made for the tokens that a cache counts, and no model takes positions for it
        with alibi_from(model.module, start):
            logits: Tensor = model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits[0, -1].float()
    extra: dict[str, object] = {}
    if counted is not None:
        positions = torch.arange(start, start + len(prompt), device=model.device)[None]
        extra = {"position_ids": positions, cache_argument(model.module): _CountingCache(counted), "use_cache": True}
    logits = model.module(input_ids=ids, **extra).logits
    return logits[0, -1].float()


def _far_logits(model: LoadedModel, prompt: list[int], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the logits after ``prompt`` at each of ``starts``, packed in one row: those of a single step, and those of a
    step of the last tokens after one of all others, each float32 of shape (starts, vocabulary)."""
    places = torch.tensor(starts, device=model.device)[:, None] + torch.arange(len(prompt), device=model.device)
    owners = torch.arange(len(starts), device=model.device)[:, None].expand_as(places)
    tokens = torch.tensor(prompt, device=model.device).expand_as(places)

    def step(cache: _PositionedPrompts, chunk: slice) -> Tensor:
        cache.step(places[:, chunk].flatten(), owners[:, chunk].flatten())
        each = tokens[:, chunk].shape[1]
        ends = [(number + 1) * each - 1 for number in range(len(starts))]
        rows = tokens[:, chunk].flatten(), places[:, chunk].flatten()
        return forward(model.module, cache, *rows, ends).float()

    whole = step(_PositionedPrompts(model.device, places[:, -1] + 1), slice(None))
    split = _PositionedPrompts(model.device, places[:, -1] + 1)
    step(split, slice(None, -1))
    return whole, step(split, slice(-1, None))


def _served_logits(
    model: LoadedModel,
    layers: Sequence[LayerShape],
    prompts: Sequence[list[int]],
    kernels: PoolKernels = PoolKernels(),  # noqa: B008  # it is immutable
    block_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits after prompts of one length, packed in one row, from three steps: a prefill step, a step of their
    second halves, and a decode step of their last tokens; each float32 of shape (prompts, vocabulary). Each prompt lies in
    blocks of ``block_tokens`` tokens, by default in a single one."""
    length = len(prompts[0])
    size = block_tokens or length
    each = -(-length // size)
    pool = KVPool(layers, len(prompts) * each, size, model.dtype, model.device, kernels=kernels)

    def step(start: int) -> Tensor:
        blocks = [range(number * each, (number + 1) * each) for number in range(len(prompts))]
        segments = [Segment(own, length, length - start) for own in blocks]
        tokens = [token for prompt in prompts for token in prompt[start:]]
        positions = [position for segment in segments for position in segment.positions]
        ends = [(number + 1) * (length - start) - 1 for number in range(len(prompts))]
        attention_step = PagedAttention(pool, segments, model.device)
        return forward(model.module, attention_step, tokens, positions, ends).float()

    return step(0), step(length // 2), step(length - 1)


_DECODER = Attachment(
    find_problem=find_dispatch_problem,
    compare=_compare,
    replace_attention=_replace_attention,
    probe_layers=_probe_layers,
    run=run_decoder,
    embeddings=lambda module: [module.get_input_embeddings()],
    explain=_explain,
    kernels=("decode", "varlen"),
    packed_logits=_served_logits,
)
