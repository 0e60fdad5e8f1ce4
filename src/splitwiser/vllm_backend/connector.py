"""vLLM's KV connector between prefill and decode engines over one KV pool: blocks are handed over by their numbers.

The KV caches of all these engines lie in the same memory, in the same layout, and each allocates from its own share of the
blocks (:mod:`splitwiser.vllm_backend.leases`). Blocks that prefill's prefix cache knows stay prefill's: decode copies what
is in them, as it does with all where each engine has a pool of its own. vLLM makes two connectors in each engine, one beside
its scheduler and one beside its model; here both are in one process and share an :class:`Exchange`. Runs in vLLM's
environment.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.request import RequestStatus

from splitwiser.errors import UnsupportedModelError
from splitwiser.vllm_backend.leases import Lender, exchange
from splitwiser.vllm_backend.messages import BlockReturn

_PLAIN = (
    FullAttentionSpec,
    MLAAttentionSpec,
)  # kinds of caches in which a block holds all that a layer keeps of its tokens


@dataclass(frozen=True)
class Exchange:
    """What an engine's two connectors and its worker share: the memory of the pool, the part of the blocks from ``first`` to
    ``last`` that the engine owns, its leases, and ``send``, which sends a message to another worker. If each engine has a
    pool of its own, ``sources`` are those of the prefill engines by name."""

    pool: Tensor
    first: float
    last: float
    sources: Mapping[str, Tensor]
    send: Callable[[str, BlockReturn], None]
    lender: Lender = field(default_factory=Lender)


_current: list[Exchange] = []  # vLLM makes its connectors itself, from text alone


def use(exchange: Exchange) -> None:
    """Set what the connectors of this process's engine share; before the engine is made."""
    _current[:] = [exchange]


@dataclass
class Ended(KVConnectorMetadata):
    """From the scheduler's connector to the model's: the leases that have ended."""

    leases: set[str]


class _AllocateIn(TorchFunctionMode):
    """vLLM allocates a KV cache by one ``torch.zeros(nbytes, dtype=torch.int8)``: inside this mode, that is ``pool``."""

    def __init__(self, pool: Tensor) -> None:
        super().__init__()
        self._pool = pool

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.zeros and kwargs.get("dtype") is torch.int8 and len(args) == 1:
            return self._pool.view(torch.int8)[: args[0]]
        return function(*args, **kwargs)


class SharedPoolConnector(KVConnectorBase_V1):
    """See the module. Raises :class:`UnsupportedModelError` for a model with other than plain attention."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._exchange = _current[0]
        self._block_tokens = vllm_config.cache_config.block_size
        self._waiting: set[str] = set()  # handed over to this engine, and their blocks not yet taken
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1 or type(groups[0].kv_cache_spec) not in _PLAIN:
            kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
            raise UnsupportedModelError(
                f"model {vllm_config.model_config.model}: its KV cache is of {len(groups)} groups of layers ({kinds}), and "
                "prefill hands over to decode one group of plain attention; use mixed workers"
            )
        self._pages = _pages(self._exchange.pool, kv_cache_config)
        self._sources = {name: _pages(pool, kv_cache_config) for name, pool in self._exchange.sources.items()}

    # -- beside the model

    def get_mem_pool_context(self) -> Any:
        """Have vLLM allocate the KV cache in the shared pool."""
        return _AllocateIn(self._exchange.pool)

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Check that every layer's cache lies in the shared pool. Raises RuntimeError if not."""
        first = self._exchange.pool.data_ptr()
        for name, cache in kv_caches.items():
            if not first <= cache.data_ptr() < first + self._exchange.pool.nbytes:
                raise RuntimeError(f"vLLM allocated the KV cache of {name} by itself, not in the shared pool")

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests whose blocks are free, since their leases have ended."""
        ended = self._get_connector_metadata()
        assert isinstance(ended, Ended)
        return ended.leases or None, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Do nothing: what prefill wrote is in the blocks already."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing; see :meth:`start_load_kv`."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: attention has written to the shared pool itself."""

    def wait_for_save(self) -> None:
        """Do nothing; see :meth:`save_kv_layer`."""

    # -- beside the scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Leave the engine its share of the blocks alone."""
        count = gpu_block_pool.num_gpu_blocks
        low, high = (int(count * part) for part in (self._exchange.first, self._exchange.last))
        for block in gpu_block_pool.blocks[1:]:  # number 0 is the null block, which every engine has and nobody reads
            if not low <= block.block_id < high:
                gpu_block_pool.free_block_queue.remove(block)

    def on_new_request(self, request: Any) -> None:
        """Note a request that was handed over."""
        if _offer(request):
            self._waiting.add(request.request_id)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return the number of tokens whose K and V prefill has computed. A request that was preempted has lost its blocks,
        and is computed again by this engine."""
        if request.request_id not in self._waiting:
            return 0, False
        return request.num_tokens - 1 - num_computed_tokens, False  # prefill drew the last one, and did not read it

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Copy the blocks that prefill keeps, take the others over that were handed over, and return as many empty ones."""
        if num_external_tokens == 0 or request.request_id not in self._waiting:
            return
        offer = request.kv_transfer_params
        own, offered, kept = blocks.blocks[0], offer["blocks"], offer["kept"]
        sources = self._sources.get(offer["prefill_worker"], self._pages)
        for block, number in zip(own, offered[:kept], strict=False):
            for pages, source in zip(self._pages, sources, strict=True):
                pages[:, block.block_id].copy_(source[:, number])
        if kept and self._exchange.pool.is_cuda:
            torch.cuda.synchronize()  # prefill may write to these blocks as soon as it knows
        given = exchange(own[kept:], offered[kept:])
        self._waiting.remove(request.request_id)
        self._exchange.send(offer["prefill_worker"], BlockReturn(offer["lease"], given))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Return the leases that have ended since the last step."""
        return Ended(self._exchange.lender.take_ended())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Lease the blocks of a finished prompt to its decode worker; return blocks that were handed over in vain."""
        if request.request_id in self._waiting:
            self._waiting.remove(request.request_id)
            offer = request.kv_transfer_params
            self._exchange.send(offer["prefill_worker"], BlockReturn(offer["lease"], ()))
            return False, None
        params = request.kv_transfer_params or {}
        if "decode_worker" not in params or request.status != RequestStatus.FINISHED_LENGTH_CAPPED:
            return False, None
        blocks = self._kv_cache_manager.get_blocks(request.request_id).blocks[0]
        used = list(blocks[: -(-request.num_computed_tokens // self._block_tokens)])
        kept = len(used)
        pool = self._kv_cache_manager.block_pool
        while not self._sources and kept and pool.is_block_writable(used[kept - 1]):
            kept -= 1  # neither cached nor another request's, as all full blocks are with prefix caching
        self._exchange.lender.lend(request.request_id, used[kept:], params["decode_worker"])
        return True, {
            "lease": request.request_id,
            "blocks": tuple(block.block_id for block in used),
            "kept": kept,
        }


def _pages(pool: Tensor, kv_cache_config: Any) -> list[Tensor]:
    """Return ``pool`` as bytes by layer, block and place in the block, one tensor for each group of layers."""
    page = kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    return [
        pool.as_strided(
            (len(tensor.layers), kv_cache_config.num_blocks, page),
            (tensor.layer_stride, tensor.block_stride, 1),
            pool.storage_offset() + tensor.offset,
        )
        for tensor in kv_cache_config.kv_cache_tensors
    ]


def _offer(request: Any) -> bool:
    return "lease" in (request.kv_transfer_params or {})
