"""The interfaces of the kernels that steps over the KV pool call; PyTorch computes where there is none."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """Sizes of what one layer of a model stores per token: ``kv_heads`` keys of ``key_dim`` numbers and as many values of
    ``value_dim`` numbers."""

    kv_heads: int
    key_dim: int
    value_dim: int


class AttentionKernel(Protocol):
    """Attention of each request's newest tokens over the pool."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        starts: Tensor,
        offsets: Tensor,
        lengths: Tensor,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        bias_by_position: bool = False,
    ) -> Tensor:
        """Attend from ``query`` (tokens, heads, key size), each token from position ``starts`` (tokens,) up to its own.

        ``keys`` and ``values`` are a layer of the pool, (blocks, block tokens, kv heads, head size), of the type of
        ``query``, or int8 (:func:`splitwiser.model.kernels.stored.quantise`) with a bfloat16 one. The block tables
        ``tables`` (requests, blocks) and ``lengths`` (requests,) say where the requests' tokens lie, the new ones last;
        ``offsets`` (requests + 1,) where each request's new tokens begin in ``query``. These are int64; a GPU's kernel also
        takes ``tables`` of int32. ``scaling`` and what follows it are the fields of
        :class:`~splitwiser.model.attention.AttentionOptions`. Returns (tokens, heads, value size).
        """
        ...


class StoreKernel(Protocol):
    """Writes K and V into a layer of the pool; the arguments are those of :meth:`splitwiser.model.kv_pool.KVPool.write`."""

    def __call__(self, pool_keys: Tensor, pool_values: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """See :class:`StoreKernel`."""
        ...


class VarlenKernel(Protocol):
    """Attention of all prompts of a prefill step, of various lengths, in one call over contiguous K and V."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        offsets: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        window: int | None,
        scaling: float,
    ) -> Tensor:
        """Attend from ``query`` (tokens, heads, key size) over ``keys`` and ``values``, (tokens of all contexts, kv heads,
        head size) each, one request after the other.

        ``offsets`` (int32, requests + 1 each) say where each request's new tokens begin in ``query``, and its whole context
        in ``keys``; a request's new tokens are the last of its context. ``longest`` holds the largest number of new tokens
        and the longest context of a request. Each token sees itself and all earlier tokens, of these ``window`` tokens at
        most (itself included) unless ``window`` is None. Returns (tokens, heads, value size).
        """
        ...


class LikeliestKernel(Protocol):
    """Finds the likeliest tokens."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the place of the largest number of each row of ``logits``, (rows, vocabulary), the first of equal ones:
        int64, (rows,)."""
        ...


@dataclass(frozen=True)
class PoolKernels:
    """The attention kernels of decode steps and of prefill steps (``prefill`` over the pool, ``varlen`` over contiguous
    K and V), the kernel that stores, and the one that finds a step's greedy tokens; PyTorch computes where one is None."""

    decode: AttentionKernel | None = None
    prefill: AttentionKernel | None = None
    store: StoreKernel | None = None
    varlen: VarlenKernel | None = None
    likeliest: LikeliestKernel | None = None
