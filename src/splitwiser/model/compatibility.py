"""Attaches the engine to a model, or refuses the model with the reason if the engine cannot serve it exactly."""

import sys
from collections.abc import Sequence
from dataclasses import astuple

import torch
from torch import Tensor

from splitwiser.errors import UnsupportedModelError, first_line
from splitwiser.model import attention
from splitwiser.model.attention import AttentionOptions, AttentionStep, Mask, StepCache
from splitwiser.model.dispatch.alibi import alibi_from, has_alibi
from splitwiser.model.dispatch.table import dispatch_attention, find_dispatch_problem
from splitwiser.model.forward import cache_argument, forward
from splitwiser.model.fusing import fuse_parts
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kernels.packed_linear import pack_linears
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import PagedAttention, Segment
from splitwiser.model.proof import BOUNDS, FAR_BOUNDS, PADDED_BOUNDS, agree, padding_keeps_logits, probe_prompts
from splitwiser.model.trials import Trial

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
    prompts = probe_prompts(model)
    try:
        with torch.inference_mode():
            if trial and trial.outcome:
                dispatch_attention(module)
                if pack:
                    fuse_parts(module, trial.outcome["fused"])
                    pack_linears(module)
                return [LayerShape(*layer) for layer in trial.outcome["layers"]]
            starts = _probe_starts(model, len(prompts[0]))
            expected = [_own_logits(model, prompt) for prompt in prompts]
            expected_far = [_own_logits(model, prompts[0], start, start) for start in starts]
            dispatch_attention(module)
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
        raise UnsupportedModelError(
            f"{name} cannot be served by the engine; use --mode generate ({type(error).__name__}: {first_line(error)})"
        ) from error
    bound = BOUNDS[model.dtype]
    if not all(agree(each, expected, bound) for each in served):
        raise UnsupportedModelError(
            f"{name}: two packed prompts do not give the same logits as each alone, so the engine would give wrong "
            "tokens; use --mode generate"
        )
    if not all(agree(each, expected_far, FAR_BOUNDS[model.dtype]) for each in served_far):
        raise UnsupportedModelError(
            f"{name}: at later positions packed prompts do not give the same logits as each alone, so the engine would "
            "give wrong tokens; use --mode generate"
        )
    # fused modules round less often than the model's own, which adds up over the layers
    if not all(agree(each, expected, 3 * bound) for each in fused):
        raise UnsupportedModelError(f"{name}: its logits change when its modules are fused; use --kernels plain")
    if trial:
        trial.remember({"layers": [astuple(layer) for layer in layers], "fused": choices})
    return layers


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
                if not all(map(agree, logits, expected, [BOUNDS[model.dtype]] * len(logits))):
                    refused[name] = "its logits differ from PyTorch's"
    return refused


@torch.inference_mode()
def padding_changes_tokens(model: LoadedModel) -> bool:
    """Return whether prompts of different lengths in one batch, padded on the left as in mode ``generate``, may give other
    tokens than each alone. False only if two prompts are shown to give the same logits, and the model to compute by the
    positions it is given, however many tokens its cache counts."""
    lengths = [5, min(12, (model.max_positions or sys.maxsize) - 1)]
    prompts = [[(7 * number + 3) % model.vocabulary for number in range(length)] for length in lengths]
    start = _probe_starts(model, lengths[0])[-1]
    try:
        near, far = (_own_logits(model, prompts[0], 0, counted) for counted in (0, start))
        return not (padding_keeps_logits(model, prompts) and agree([near], [far], PADDED_BOUNDS[model.dtype]))
    except Exception:  # any error of the model's forward: nothing is shown
        return True


class _LayerProbe(AttentionStep):
    """Takes the place of the pool in one forward and records what each layer does."""

    def __init__(self) -> None:
        self.stored: dict[int, LayerShape] = {}
        self.events: list[tuple[str, int]] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.events.append(("stores", layer_idx))
        self.stored[layer_idx] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        self.events.append(("attends", self.events[-1][1] if self.events else -1))
        if not isinstance(mask, Mask):
            raise UnsupportedModelError("a layer attends without the model's mask")
        first = torch.zeros((), dtype=torch.long, device=query.device)
        if bool(mask(first, first + 1)):
            raise UnsupportedModelError("a layer's attention looks at later tokens")
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
    earlier steps, and nothing before its start."""

    def __init__(self, device: torch.device) -> None:
        self._positions = torch.empty(0, dtype=torch.long, device=device)
        self._owners = self._positions
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._layer = -1

    def step(self, positions: Tensor, owners: Tensor) -> None:
        """Begin a step: its tokens are at ``positions`` of the prompts ``owners``, (tokens,) each."""
        self._positions = torch.cat([self._positions, positions])
        self._owners = torch.cat([self._owners, owners])

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self._layer = layer_idx
        if layer_idx in self._stored:
            before = self._stored[layer_idx]
            self._stored[layer_idx] = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        else:
            self._stored[layer_idx] = key, value
        return key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        assert isinstance(mask, Mask)
        new = slice(-query.shape[2], None)
        positions, owners = self._positions[new, None], self._owners[new, None]
        seen = (owners == self._owners) & (self._positions <= positions) & mask(positions, self._positions[None])
        stored = options.expanded(*self._stored[self._layer])
        return attention.attend(
            query, *stored, seen, options, (positions[None], self._positions[None, None])
        ).transpose(1, 2)


def _probe_layers(model: LoadedModel, prompt: list[int]) -> list[LayerShape]:
    probe = _LayerProbe()
    try:
        forward(model.module, probe, prompt, range(len(prompt)), [len(prompt) - 1])
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model.module).__name__}: {error}; use --mode generate") from error
    layers = model.module.config.get_text_config().num_hidden_layers
    expected = [(event, layer) for layer in range(layers) for event in ("stores", "attends")]
    if probe.events != expected:
        if 0 < len(probe.stored) < layers:
            raise UnsupportedModelError(
                f"{type(model.module).__name__}: only {len(probe.stored)} of {layers} layers store K and V and the others "
                "attend to theirs, which the engine cannot serve; use --mode generate"
            )
        seen = sum(event == "attends" for event, _ in probe.events)
        raise UnsupportedModelError(
            f"{type(model.module).__name__}: {seen} attentions over stored K and V in a forward of {layers} layers, where "
            "each layer must store and attend exactly once; use --mode generate"
        )
    return [probe.stored[layer] for layer in range(layers)]


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

    whole = step(_PositionedPrompts(model.device), slice(None))
    split = _PositionedPrompts(model.device)
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
