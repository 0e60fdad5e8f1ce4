"""The attention function and the mask that models of transformers call in place of their own.

A model whose attention implementation is :data:`NAME` calls, in each layer and in this order, ``update`` of the cache
object it was given (an :class:`AttentionStep`), which stores K and V, and then :func:`attention_function`, which attends.
Requests are packed one after another in a single row without padding. Only the :class:`AttentionStep` knows which tokens
belong to which request; which positions may see each other is asked of the model's own mask function, so causal, sliding
and chunked masks are all served.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from splitwiser.errors import UnsupportedModelError

NAME = "splitwiser"

# On Hopper PyTorch prefers cuDNN's attention for half precisions, which makes a plan for each new length of a prompt and of
# its K and V: tenths of a second each. Off for the process, in mode generate too; flash attention is used instead.
torch.backends.cuda.enable_cudnn_sdp(False)

_BIASES_AT_ONCE = 2**24  # numbers: a bias for every head, query and key of a long prompt would take gigabytes

MaskFunction = Callable[..., Any]  # of transformers: (batch, head, query positions, key positions) -> boolean

# what models pass to every attention function and what has no effect on the attention itself
# (the mask covers windows and causality already)
_IGNORED_ARGUMENTS = {"position_ids", "cache_position", "use_cache", "is_causal", "sliding_window"}


@dataclass(frozen=True)
class Mask:
    """A model's mask function, passed where a mask tensor would be and evaluated for absolute positions."""

    function: MaskFunction
    ndim: ClassVar[int] = 0  # no tensor that a model could add to

    def to(self, *_: object) -> "Mask":
        """Return the mask itself, to models that ask for a type of mask."""
        return self

    @property
    def is_causal(self) -> bool:
        """Whether each position sees itself and all earlier ones."""
        return self.function is causal_mask_function

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return which ``keys`` positions each of ``queries`` positions may see: boolean, of their broadcast shape."""
        seen: Tensor = self.function(0, 0, queries, keys)
        return seen.expand(torch.broadcast_shapes(queries.shape, keys.shape))


def mask_function_interface(*, mask_function: MaskFunction, **_: object) -> Mask:
    """Return ``mask_function`` as a :class:`Mask`; transformers calls this where it would build a mask tensor.

    A padding mask among the other arguments is all ones and made by the model itself: the engine passes none.
    """
    return Mask(mask_function)


@dataclass(frozen=True)
class AttentionOptions:
    """Options of a layer's attention beside the mask: the scale of the scores, their soft-cap (``cap * tanh(score / cap)``,
    before the mask) and the heads' sinks (one extra logit per head in the softmax, shape (heads,)).

    ``bias``, contiguous float32 of shape (heads, entries), is added to the scaled and capped scores: its entry d for the key
    d tokens before the query, as T5's relative bias; or with ``bias_by_position`` its entry p for the key at position p, as
    ALiBi. What lies past the last entry takes that one.

    ``expand`` turns what the layer stores into K and V, shapes (n, stored heads, tokens, stored size) into (n, kv_heads,
    tokens, head size). None if it stores K and V themselves; multi-head latent attention (MLA) stores a latent vector and
    the rotated part of the keys.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    bias_by_position: bool = False
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    @property
    def fits_varlen(self) -> bool:
        """Whether a :class:`~splitwiser.model.kernels.interface.VarlenKernel` takes these options."""
        return self.softcap is None and self.sinks is None and self.bias is None

    def expanded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return K and V of what a layer has stored; shapes as for ``expand``."""
        return self.expand(keys, values) if self.expand else (keys, values)

    def bias_at(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the bias of the scores between positions ``queries`` and ``keys``, int64 and broadcastable to (n, q, k):
        float32, broadcastable to (n, heads, q, k)."""
        assert self.bias is not None
        entries = (keys if self.bias_by_position else queries - keys).clamp(0, self.bias.shape[1] - 1)
        return self.bias[:, entries].movedim(0, -3)


class StepCache:
    """The methods that models call on their cache beside ``update``: to them, each step has an empty cache."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens as the model sees it: positions are passed explicitly."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Index of the first query in the mask; masks are evaluated for absolute positions instead."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys in the mask, for the same reason those of this step."""
        return query_length, 0


class AttentionStep(StepCache, ABC):
    """The attention of one forward: each layer stores its K and V with ``update`` and then attends with ``attend``; or it
    stores none and attends to those of an earlier layer, which the model hands it."""

    def __init__(self) -> None:
        self.wanted_rows: Tensor | None = (
            None  # of the step's tokens, those after which logits are computed; None: unknown
        )
        self._last_stored: int | None = None  # the layer, until it has attended
        self._stored_keys: dict[int, ref[Tensor]] = {}

    @property
    def loras(self) -> Tensor | None:
        """The number of the LoRA adapter of each of the step's tokens, int64 of shape (tokens,), 0 for none; None if no
        token has one."""
        return None

    def loras_of(self, rows: int) -> Tensor | None:
        """Return :attr:`loras` for the ``rows`` rows that a layer is given, one for each of the step's tokens. Raises
        :class:`UnsupportedModelError` for another number, since the adapters of the rows are then unknown."""
        if self.loras is not None and rows != len(self.loras):
            raise UnsupportedModelError(f"a layer with LoRA has {rows} rows in a step of {len(self.loras)} tokens")
        return self.loras

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store this step's K and V of a layer, each of shape (1, kv_heads, tokens, head size), and return them."""
        self.store(layer_idx, key, value)
        self._last_stored = layer_idx
        self._stored_keys[layer_idx] = ref(key)
        return key, value

    def attended_layer(self, key: Tensor) -> int:
        """Return the layer whose K and V an attention is over: the one that has just stored its own, or else the one that
        ``key`` was stored by. To be called once an attention. Raises :class:`UnsupportedModelError` if no layer stored
        ``key``."""
        layer, self._last_stored = self._last_stored, None
        if layer is None:
            layer = next((number for number, stored in self._stored_keys.items() if stored() is key), None)
        if layer is None:
            raise UnsupportedModelError("a layer attends to K and V that no layer has stored")
        return layer

    def lengths(self, positions: Tensor) -> Tensor:
        """Return the length of each token's request as its model's own forward would know it, of ``positions``' shape: here
        that it ends with the token, as in a decode step."""
        return positions + 1

    @abstractmethod
    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep this step's K and V of a layer, shapes as in :meth:`update`."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """Return the attention of this step's tokens over all tokens of their own requests; shapes as in
        :func:`attention_function`."""


_step: ContextVar[AttentionStep] = ContextVar("splitwiser_step")


@contextmanager
def serving(step: AttentionStep) -> Iterator[None]:
    """Let attention layers that this thread calls inside the ``with`` block attend through ``step``."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current_step() -> AttentionStep:
    """Return the step of the ``with serving`` block that this runs in."""
    return _step.get()


def find_step() -> AttentionStep | None:
    """Return :func:`current_step`; None outside of a ``with serving`` block."""
    return _step.get(None)


def current_loras(rows: int) -> Tensor | None:
    """Return :meth:`AttentionStep.loras_of` of the current step; None outside of a ``with serving`` block."""
    step = find_step()
    return None if step is None else step.loras_of(rows)


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
    bias: Tensor | None = None,
    bias_by_position: bool = False,
    position_bias: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend from ``query`` (1, heads, tokens, head size) through the current :class:`AttentionStep`; ``key`` and ``value``
    are those of this step's tokens. Every attention layer calls this; for ``bias``, or ``position_bias`` as T5 calls it, see
    :class:`AttentionOptions`.

    Returns (1, tokens, heads, value size). Raises :class:`UnsupportedModelError` for an argument with an unknown meaning,
    since ignoring it would give wrong tokens.
    """
    asked = sorted(
        name for name, given in others.items() if name not in _IGNORED_ARGUMENTS and given not in (None, False)
    )
    if dropout or asked:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention for {', '.join(asked) or 'dropout'}, which the engine cannot serve"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # transformers' models with MLA store latents and expand only those of this step
    expand = getattr(module, "expand_kv", None)
    bias = position_bias if bias is None else bias
    options = AttentionOptions(scaling, softcap, s_aux, bias, bias_by_position, expand)
    return current_step().attend(query, key, value, attention_mask, options), None


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function_interface)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    options: AttentionOptions,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute attention of ``query`` (n, heads, q, head size) over ``key`` and ``value`` (n, kv_heads, k, head size) in
    PyTorch.

    ``seen`` is boolean, broadcastable to (n, heads, q, k); None is causal with q = k. A bias takes ``positions``, those of
    the queries (n or 1, q, 1) and of the keys (n or 1, 1, k), int64; by default they are 0, 1, ... for both. With fewer
    ``kv_heads`` than ``heads``, groups of heads share K and V. Returns (n, heads, q, value size).
    """
    if options.bias is not None:
        return _attend_with_bias(query, key, value, seen, options, positions)
    same_sizes = query.shape[3] == value.shape[3]  # PyTorch's function for CPUs takes no others
    if options.softcap is None and options.sinks is None and same_sizes and not _is_faster_unfused(query):
        return _fused(query, key, value, seen, options.scaling)
    return _unfused(query, key, value, _causal(query, key) if seen is None else seen, options, None)


def _attend_with_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    options: AttentionOptions,
    positions: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Compute :func:`attend` with a bias, for so few queries at a time that the biases take little memory."""
    if seen is None:
        seen = _causal(query, key)
    if positions is None:
        own, others = (torch.arange(each.shape[2], device=query.device) for each in (query, key))
        positions = own[None, :, None], others[None, None]
    queries, keys = positions
    rows = max(1, _BIASES_AT_ONCE // (query.shape[0] * query.shape[1] * key.shape[2]))
    # a half precision would round the bias, which PyTorch's function takes in the type of the queries
    fusable = options.softcap is None and options.sinks is None and query.shape[3] == value.shape[3]
    fusable = fusable and query.dtype in (torch.float32, torch.float64)
    made = []
    for start in range(0, query.shape[2], rows):
        part = slice(start, start + rows)
        bias, visible = options.bias_at(queries[:, part], keys), seen[..., part, :]
        if fusable:
            bias = bias.to(query.dtype).where(visible, float("-inf"))
            made.append(_fused(query[:, :, part], key, value, bias, options.scaling))
        else:
            made.append(_unfused(query[:, :, part], key, value, visible, options, bias))
    return made[0] if len(made) == 1 else torch.cat(made, dim=2)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attend by PyTorch's function; ``mask`` is what is seen or a bias, None causal."""
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _unfused(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, options: AttentionOptions, bias: Tensor | None
) -> Tensor:
    """Attend by separate products, with the scores and all that is done to them in float32."""
    count, heads, queries, _ = query.shape
    query = query.unflatten(1, (key.shape[1], heads // key.shape[1]))
    scores = torch.einsum("nhgqd,nhkd->nhgqk", query, key).flatten(1, 2).float() * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, heads, 1, 1).expand(count, heads, queries, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype).unflatten(1, (key.shape[1], -1))
    return torch.einsum("nhgqk,nhkd->nhgqd", weights, value).flatten(1, 2)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """Return what a causal mask lets each of as many queries as keys see: boolean (q, k)."""
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()


def _is_faster_unfused(query: Tensor) -> bool:
    """Whether separate products are faster than PyTorch's fused function: with one query per request in a half precision
    on a CPU, they take a third of its time."""
    return query.device.type == "cpu" and query.shape[2] == 1 and query.dtype != torch.float32
