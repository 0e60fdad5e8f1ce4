"""What reads and writes the KV pool, beside plain PyTorch."""

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
    ) -> Tensor:
        """Attend from ``query`` (tokens, heads, key size), each token from position ``starts`` (tokens,) up to its own.

        ``keys`` and ``values`` are a layer of the pool, (blocks, block tokens, kv heads, head size); ``tables`` (requests,
        blocks) and ``lengths`` (requests,) say where the requests' tokens lie, the new ones last; ``offsets`` (requests +
        1,) where each request's new tokens begin in ``query``. These are int64; a GPU's kernel takes ``tables`` of
        int32 too. Returns (tokens, heads, value size).
        """
        ...


class StoreKernel(Protocol):
    """Writes K and V into a layer of the pool; the arguments are those of :meth:`splitwiser.model.kv_pool.KVPool.write`."""

    def __call__(self, pool_keys: Tensor, pool_values: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """See :class:`StoreKernel`."""
        ...


class PackedKernel(Protocol):
    """Attention of all prompts of a prefill step in one call, over K and V that are packed like the queries."""

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
        head size) each.

        ``offsets`` (int32, requests + 1 each) say where each request's new tokens begin in ``query``, and its whole context
        in ``keys``; a request's new tokens are the last of its context. ``longest`` are the most new tokens and the longest
        context of a request. Each token sees itself and what comes before, of which a ``window`` leaves the last so many
        (itself included). Returns (tokens, heads, value size).
        """
        ...


@dataclass(frozen=True)
class PoolKernels:
    """The kernel of decode steps, that of other steps (over the pool, or over packed K and V), and that which stores; None:
    PyTorch does it."""

    decode: AttentionKernel | None = None
    prefill: AttentionKernel | None = None
    store: StoreKernel | None = None
    packed: PackedKernel | None = None
