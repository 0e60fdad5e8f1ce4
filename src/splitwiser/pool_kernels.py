"""What reads and writes the KV pool, beside plain PyTorch."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
    """Writes K and V into a layer of the pool; the arguments are those of :meth:`splitwiser.kv_pool.KVPool.write`."""

    def __call__(self, pool_keys: Tensor, pool_values: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """See :class:`StoreKernel`."""
        ...


@dataclass(frozen=True)
class PoolKernels:
    """The kernel of decode steps, that of other steps, and that which stores; None: PyTorch does it."""

    decode: AttentionKernel | None = None
    prefill: AttentionKernel | None = None
    store: StoreKernel | None = None
