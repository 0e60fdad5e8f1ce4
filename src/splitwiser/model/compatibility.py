"""Attaches the engine to a model, or refuses the model with the reason if the engine cannot serve it exactly."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from splitwiser.errors import UnsupportedModelError, first_line
from splitwiser.model import attention
from splitwiser.model.attention import AttentionOptions, AttentionStep, Mask, StepCache
from splitwiser.model.dispatch.alibi import alibi_from, has_alibi
from splitwiser.model.dispatch.table import RECURRENT, dispatch_attention, find_dispatch_problem
from splitwiser.model.forward import cache_argument, forward
from splitwiser.model.fusing import fuse_parts
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kernels.packed_linear import pack_linears
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.padding import pad_left
from splitwiser.model.paged_attention import PagedAttention, Segment
from splitwiser.model.rotary import depends_on_length, serve_lengths
from splitwiser.model.trials import Trial

# Relative to the largest logit: half precisions differ by rounding; a dropped term or a leak between requests by far more.
_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# tighter, since an error that grows with the position changes the logits of random weights only little
_FAR_BOUNDS = {**_BOUNDS, torch.float32: 1e-4}
# A model may make more of rounding than that: then twice what it makes of its embeddings being rounded differently, up to a
# quarter of the largest logit, beyond which nothing would be shown.
_MOST_ROUNDING = 0.25
_ROUNDINGS = 3
# what a model asks of its cache beside K and V, by a part of the method's name
_INDEXED = "keeps an index of all tokens, by which it chooses those that it attends to, which the engine cannot serve"
_UNSERVED_STATE = {"conv_state": RECURRENT, "recurrent_state": RECURRENT, "indexer": _INDEXED}
_FAR = 2**17  # the last position that is tried if a model has no limit


def attach_engine(model: LoadedModel, *, pack: bool = False, remember: bool = False) -> list[LayerShape]:
    """Make ``model`` attend through the KV pool, and return the shape of what each of its layers stores there. With
    ``pack``, its modules are fused and, on a CPU, its linear layers packed, and the check of the logits covers that. With
    ``remember``, what an earlier load of the same model found is not tried again (:mod:`splitwiser.model.trials`).

    Raises :class:`UnsupportedModelError` with the reason unless the engine is shown to serve the model exactly: the class
    must dispatch its attention through transformers' interface, or through a module of
    :mod:`splitwiser.model.dispatch`; in a forward each layer must store K and V and then attend
    exactly once, with a causal mask; and prompts packed in one row must give the logits that the model's own attention gives
    for each alone, at the first positions and up to the last that the model supports.
    """
    module = model.module
    name = type(module).__name__
    if problem := find_dispatch_problem(module):
        raise UnsupportedModelError(problem)
    trial = Trial(model, f"attach, packed: {pack}") if remember else None
    prompts = _probe_prompts(model)
    try:
        with torch.inference_mode():
            if trial and trial.outcome:
                _attach(module)
                if pack:
                    fuse_parts(module, trial.outcome["fused"])
                    pack_linears(module)
                return [LayerShape(*layer) for layer in trial.outcome["layers"]]
            starts = _probe_starts(model, len(prompts[0]))
            expected = [_own_logits(model, prompt) for prompt in prompts]
            expected_far = [_own_logits(model, prompts[0], start, start) for start in starts]
            _attach(module)
            layers = _probe_layers(model, prompts[0])
            served = _served_logits(model, layers, prompts)
            served_far = _far_logits(model, prompts[0], starts)
            choices = fuse_parts(module) if pack else []
            if pack:
                pack_linears(module)
            fused = _served_logits(model, layers, prompts) if pack else served
    except UnsupportedModelError:
        raise
    except Exception as error:  # any error of the model's forward means that it cannot be served
        raise UnsupportedModelError(f"{name} {_cause(error)}; use --mode generate") from error
    bound, far_bound = _BOUNDS[model.dtype], _FAR_BOUNDS[model.dtype]
    trials = [(served, expected), (served_far, expected_far), (fused, expected)]
    if model.dtype != torch.float32 and not all(_agree(each, own, bound) for ours, own in trials for each in ours):
        rounding = _find_rounding(model, layers, prompts, fused)
        bound = far_bound = max(bound, min(2 * rounding, _MOST_ROUNDING))
    if not all(_agree(each, expected, bound) for each in served):
        raise UnsupportedModelError(
            f"{name}: two packed prompts do not give the same logits as each alone, so the engine would give wrong "
            "tokens; use --mode generate"
        )
    if not all(_agree(each, expected_far, far_bound) for each in served_far):
        raise UnsupportedModelError(
            f"{name}: at later positions packed prompts do not give the same logits as each alone, so the engine would "
            "give wrong tokens; use --mode generate"
        )
    # fused modules round less often than the model's own, which adds up over the layers
    if not all(_agree(each, expected, 3 * bound) for each in fused):
        raise UnsupportedModelError(f"{name}: its logits change when its modules are fused; use --kernels plain")
    if trial:
        trial.remember({"layers": [astuple(layer) for layer in layers], "fused": choices})
    return layers


@torch.inference_mode()
def _find_rounding(
    model: LoadedModel, layers: Sequence[LayerShape], prompts: Sequence[list[int]], logits: Sequence[Tensor]
) -> float:
    """Return by how much ``logits``, those of :func:`_served_logits`, change at most, relative to the largest, when each
    number of the embeddings is one rounding larger or smaller: what the model makes of rounding alone."""
    random = torch.Generator().manual_seed(0)

    def round_differently(_: torch.nn.Module, __: object, embedded: Tensor) -> Tensor:
        signs = torch.randint(0, 2, embedded.shape, generator=random).to(embedded) * 2 - 1
        return embedded * (1 + torch.finfo(embedded.dtype).eps * signs)

    hook = model.module.get_input_embeddings().register_forward_hook(round_differently)
    try:
        again = [each for _ in range(_ROUNDINGS) for each in _served_logits(model, layers, prompts)]
    finally:
        hook.remove()
    pairs = zip(again, [*logits] * _ROUNDINGS, strict=True)
    return max(float(((new - old).abs().amax(-1) / old.abs().amax(-1)).max()) for new, old in pairs)


def _cause(error: Exception) -> str:
    """Return why a model cannot be served whose forward raised ``error``, to follow its name."""
    if isinstance(error, AttributeError) and isinstance(error.obj, StepCache):
        return next(
            (why for part, why in _UNSERVED_STATE.items() if part in str(error.name)),
            f"asks its cache for {error.name}, which the engine's does not have",
        )
    return f"cannot be served by the engine ({type(error).__name__}: {first_line(error)})"


def _attach(module: PreTrainedModel) -> None:
    dispatch_attention(module)
    serve_lengths(module)


def try_kernels(
    model: LoadedModel, layers: Sequence[LayerShape], kernels: PoolKernels, block_tokens: int
) -> dict[str, str]:
    """Return why ``kernels.decode`` or ``kernels.varlen`` cannot serve ``model``, which the engine is attached to: one line
    each, by the name of the field of :class:`~splitwiser.model.kernels.interface.PoolKernels`. Both are tried on two prompts
    of over two blocks."""
    length = min(2 * block_tokens + 5, model.max_positions or sys.maxsize)
    prompts = [[(7 * number + 3) % model.vocabulary for number in range(start, start + length)] for start in (0, 11)]
    refused = {}
    with torch.inference_mode():
        expected = _served_logits(model, layers, prompts)
        for name in ("decode", "varlen"):
            if (kernel := getattr(kernels, name)) is None:
                continue
            try:
                logits = _served_logits(model, layers, prompts, PoolKernels(**{name: kernel}), block_tokens)
            except Exception as error:  # Triton's errors derive from Exception alone
                refused[name] = f"{type(error).__name__}: {first_line(error)}"
            else:
                if not all(map(_agree, logits, expected, [_BOUNDS[model.dtype]] * len(logits))):
                    refused[name] = "its logits differ from PyTorch's"
    return refused


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
    # products of a batch round differently than those of a row, which adds up over the layers in half precisions; a wrong
    # position is as far off as another prompt
    bound = _FAR_BOUNDS[model.dtype] * (1 if model.dtype == torch.float32 else 3)
    try:
        alone = [_generated_logits(model, [prompt]) for prompt in prompts]
        together = _generated_logits(model, prompts)
        near, far = (_own_logits(model, prompts[0], 0, counted) for counted in (0, start))
    except Exception:  # any error of the model's forward: nothing is shown
        return True
    first, second = (_agree(together[step], [each[step][0] for each in alone], bound) for step in (0, 1))
    # if rounding changed the first token, the second shows nothing
    same_token = [each[0][0].argmax() for each in alone] == list(together[0].argmax(dim=-1))
    return not (first and (second or not same_token) and _agree(near[None], [far], bound))


def _generated_logits(model: LoadedModel, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Return the logits of two steps of transformers' own generation for a padded batch of ``prompts``, each float32 of
    shape (prompts, vocabulary)."""
    ids, mask = pad_left(prompts, model.device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=2, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    generate = cast("Callable[..., Any]", model.module.generate)
    first, second = generate(input_ids=ids, attention_mask=mask, generation_config=config).logits
    return first.float(), second.float()


def logits_agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two tensors of logits, (rows, vocabulary) each, differ by no more than rounding in ``dtype`` does."""
    return _agree(ours.float(), theirs.float(), _BOUNDS[dtype])


def _agree(ours: Tensor, theirs: Tensor | Sequence[Tensor], bound: float) -> bool:
    return all(
        bool((one - other).abs().max() <= bound * other.abs().max()) for one, other in zip(ours, theirs, strict=True)
    )


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


def _probe_layers(model: LoadedModel, prompt: list[int]) -> list[LayerShape]:
    own_cache = DynamicCache(config=model.module.config.get_text_config())
    probe = _LayerProbe([getattr(layer, "sliding_window", None) for layer in own_cache.layers])
    try:
        forward(model.module, probe, prompt, range(len(prompt)), [len(prompt) - 1])
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model.module).__name__}: {error}; use --mode generate") from error
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
            f"{type(model.module).__name__}: in a forward of its {layers} layers, K and V are stored {len(stored)} times "
            f"and attended to {attentions} times, where each layer must attend once, to those that it has just stored or "
            "that an earlier layer has; use --mode generate"
        )
    return [probe.stored[layer] for layer in stored]


def _probe_prompts(model: LoadedModel) -> list[list[int]]:
    return [[(7 * number + 3) % model.vocabulary for number in range(start, start + 5)] for start in (0, 11)]


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
