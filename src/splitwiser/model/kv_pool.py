"""The paged KV pool: the preallocated KV cache of all requests in blocks, the allocator of its blocks, and its size."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from splitwiser.errors import InputError
from splitwiser.machine.memory import free_memory
from splitwiser.machine.pages import map_memory, use_pages
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kernels.stored import dequantise, quantise, stored_size
from splitwiser.text import parse_bytes

PREFAULT_BYTES = 1 << 30  # at most, of a worker's part of a pool


class KVPool:
    """Keys and values of every layer, each a tensor of shape (blocks, block_tokens, kv_heads, head size) in ``dtype``, the
    model's or another. With int8 the last dimension is larger: see
    :func:`~splitwiser.model.kernels.stored.quantise`.

    A *slot* holds one token: its number is block number x ``block_tokens`` + offset in the block. ``blocks`` are the blocks
    for requests; ``shared_blocks`` more, with the numbers after these, hold the virtual tokens of adapters. The pool lies in
    ``memory`` (uint8, :func:`block_nbytes` bytes a block), such as memory that processes share, or in memory of its own. It
    must be zeroed: a masked slot has to hold finite numbers, since 0 x NaN is NaN. ``kernels`` read and write it.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: Tensor | None = None,
        kernels: PoolKernels = PoolKernels(),  # noqa: B008  # it is immutable
        shared_blocks: int = 0,
    ) -> None:
        self.layers, self.dtype = layers, dtype
        self.blocks = blocks
        self.all_blocks = blocks + shared_blocks
        self.kernels = kernels
        self.block_tokens = block_tokens
        if memory is None:
            memory = zeroed_memory(block_nbytes(layers, block_tokens, dtype) * self.all_blocks, device)
        slots = self.all_blocks * block_tokens
        rows = [
            (layer.kv_heads, stored_size(size, dtype)) for layer in layers for size in (layer.key_dim, layer.value_dim)
        ]
        parts = memory.view(dtype).split([slots * heads * size for heads, size in rows])
        stored = [part.view(self.all_blocks, block_tokens, *row) for part, row in zip(parts, rows, strict=True)]
        self.keys: list[Tensor] = stored[::2]
        self.values: list[Tensor] = stored[1::2]

    def prefault(self, blocks: range) -> None:
        """Have the system map the pages of the first of ``blocks``, up to :data:`PREFAULT_BYTES` bytes. It would map each
        when it is first written to, which takes microseconds that a step would wait for. Writes nothing. Does nothing on a
        GPU, whose memory is mapped already."""
        if self.keys[0].is_cuda:
            return
        first = blocks[: PREFAULT_BYTES // (self.nbytes // self.all_blocks)]
        for tensor in [*self.keys, *self.values]:
            use_pages(tensor[first.start : first.stop])

    @property
    def nbytes(self) -> int:
        """Size of all keys and values in bytes."""
        return sum(tensor.nbytes for tensor in [*self.keys, *self.values])

    @property
    def query_dtype(self) -> torch.dtype:
        """The type of the queries that attention kernels take."""
        return torch.bfloat16 if self.dtype == torch.int8 else self.dtype

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store ``keys`` and ``values`` of shape (tokens, kv_heads, head size) in ``slots`` (int64, shape (tokens,))."""
        if self.dtype != torch.int8:
            keys, values = keys.to(self.dtype), values.to(self.dtype)
        if self.kernels.store:
            self.kernels.store(self.keys[layer], self.values[layer], slots, keys, values)
        else:
            if self.dtype == torch.int8:
                keys, values = quantise(keys), quantise(values)
            self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
            self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def copy_tokens(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` tokens of block ``source`` to block ``target``, in every layer."""
        for tensor in [*self.keys, *self.values]:
            tensor[target, :tokens] = tensor[source, :tokens]

    def read(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values in the blocks of ``tables`` (int64, shape (requests, blocks)), each of shape
        (requests, blocks x block_tokens, kv_heads, head size); of an int8 pool in float32."""
        keys, values = self.keys[layer][tables].flatten(1, 2), self.values[layer][tables].flatten(1, 2)
        return (dequantise(keys), dequantise(values)) if self.dtype == torch.int8 else (keys, values)

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that ``tokens`` tokens need."""
        return -(-tokens // self.block_tokens)


def zeroed_memory(nbytes: int, device: torch.device) -> Tensor:
    """Return ``nbytes`` zeros on ``device`` as a uint8 tensor."""
    if device.type == "cuda":
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    return map_memory(nbytes)  # torch would write the zeros


def stored_dtype(kv_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """Return what a pool with ``--kv_dtype`` ``kv_dtype`` stores of a model in ``dtype``."""
    return dtype if kv_dtype == "auto" else getattr(torch, kv_dtype)


def block_nbytes(layers: Sequence[LayerShape], block_tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block over all layers."""
    sizes = ((layer.kv_heads, size) for layer in layers for size in (layer.key_dim, layer.value_dim))
    return sum(heads * stored_size(size, dtype) for heads, size in sizes) * block_tokens * dtype.itemsize


class BlockAllocator:
    """Allocates the ``count`` blocks of the pool from number ``first`` on, and counts the references to each. It has one
    owner, a decode worker; no other worker allocates or releases these blocks.

    A block without references is free. One that was marked by :meth:`keep` keeps its K and V for as long as others are free:
    those that were released last are overwritten last, and ``on_reuse`` is called with the number of each before it is.
    """

    def __init__(self, first: int, count: int) -> None:
        self.count = count
        self.on_reuse: Callable[[int], None] = lambda _: None
        self._free = list(range(first + count - 1, first - 1, -1))
        self._references: dict[int, int] = {}
        self._marked: set[int] = set()
        self._kept: dict[int, None] = {}  # free and marked, in order of release

    @property
    def free_count(self) -> int:
        """Number of free blocks."""
        return len(self._free) + len(self._kept)

    def allocate(self, count: int) -> list[int] | None:
        """Return the numbers of ``count`` blocks, now with one reference each; None if fewer are free."""
        if count > self.free_count:
            return None
        while len(self._free) < count:  # the least recently used
            oldest = next(iter(self._kept))
            self.on_reuse(oldest)
            self.forget(oldest)
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of ``blocks``, which are in use or marked."""
        for block in blocks:
            self._kept.pop(block, None)
            self._references[block] = self._references.get(block, 0) + 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take a reference from each of ``blocks``. Raises ValueError if one is not in use."""
        released: set[int] = set()
        for block in blocks:
            if block not in self._references or block in released:
                raise ValueError(f"blocks [{block}] are not in use; a block is freed once")
            released.add(block)
        for block in reversed(blocks):  # what a request read first is kept longest: more requests begin with it
            self._references[block] -= 1
            if self._references[block]:
                continue
            del self._references[block]
            if block in self._marked:
                self._kept[block] = None
            else:
                self._free.append(block)

    def keep(self, block: int) -> None:
        """Mark a block in use, so that what it holds is kept after its release."""
        self._marked.add(block)

    def forget(self, block: int) -> None:
        """Undo :meth:`keep`."""
        self._marked.discard(block)
        if block in self._kept:
            del self._kept[block]
            self._free.append(block)

    def is_used(self, block: int) -> bool:
        """Whether a block has a reference."""
        return block in self._references


_LONGEST_REQUEST = 8192  # tokens per request at most, assumed if the pool's size is chosen automatically


def plan_blocks(
    layers: Sequence[LayerShape],
    kv_memory: str,
    block_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    max_batch: int,
    max_positions: int | None,
    available: int | None = None,
) -> int:
    """Return the number of blocks of the pool.

    ``kv_memory`` is a size such as ``512MiB``, or ``auto``: what ``max_batch`` requests of the model's longest length need,
    but at most a quarter of a CPU's available memory or half of a GPU's free memory after loading. ``available`` is that
    memory in bytes, read from the device by default. Raises :class:`InputError` if ``kv_memory`` is not a size, less than
    one block, or more than ``available``.
    """
    nbytes = block_nbytes(layers, block_tokens, dtype)
    if available is None:
        available = free_memory(device)
    if kv_memory != "auto":
        size = parse_bytes(kv_memory)
        if size < nbytes:
            raise InputError(
                f"--kv_memory '{kv_memory}' is less than one block, which takes {nbytes} bytes for this model"
            )
        if problem := find_pool_problem(kv_memory, available):
            raise InputError(problem)
        return size // nbytes
    longest = min(max_positions or _LONGEST_REQUEST, _LONGEST_REQUEST)
    wanted = max_batch * -(-longest // block_tokens)
    affordable = available // (2 if device.type == "cuda" else 4)
    return max(1, min(wanted, affordable // nbytes))


def find_memory_problem(
    name: str, weights: int, dtype: torch.dtype, kv_memory: str, free: int, device: torch.device
) -> str | None:
    """Return why ``weights`` bytes of model ``name`` and a KV pool of size ``kv_memory`` do not fit in the ``free`` bytes of
    ``device``, in one line; None if they fit. With ``auto`` the pool takes what is left.

    Raises :class:`InputError` if ``kv_memory`` is not a size.
    """
    if weights > free:
        return (
            f"model {name}: its weights in {str(dtype).removeprefix('torch.')} take {weights / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are available on {device}; a smaller --dtype or model is needed"
        )
    return find_pool_problem(kv_memory, free - weights, " beside the weights")


def find_pool_problem(kv_memory: str, available: int, beside: str = "") -> str | None:
    """Return why a pool of size ``kv_memory`` does not fit in ``available`` bytes, in one line that ends with ``beside``;
    None if it fits, as ``auto`` always does. Raises :class:`InputError` if ``kv_memory`` is not a size."""
    if kv_memory == "auto" or parse_bytes(kv_memory) <= available:
        return None
    return f"--kv_memory '{kv_memory}' is more than the {available / 2**30:.1f} GiB that are available{beside}"
