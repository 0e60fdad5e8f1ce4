"""vLLM's load format ``splitwiser``: engines on a CPU over one copy of the weights. Runs in vLLM's environment.

The first engine reads the checkpoint as vLLM does and moves its weights to the shared file; the others map them. Weights of
linear layers lie there packed for oneDNN, once; vLLM's own loader would make a packed copy in every engine.
"""

import ctypes
import fcntl
import gc
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.utils.torch_utils import set_default_torch_dtype

from splitwiser.errors import UnsupportedModelError
from splitwiser.machine.pages import ALIGNMENT, map_memory, use_pages
from splitwiser.model.kernels.onednn import open_packed, pack_weight

_PACKED = (torch.bfloat16, torch.float32)  # what oneDNN packs


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the model lies in the shared file. Of a linear layer's weight that is ``packed``, in this layout,
    there may be no plain copy; ``plain`` is then None."""

    plain: int | None
    packed: int | None = None
    layout: bytes = b""


class SharedLoader(BaseModelLoader):
    """See the module. Takes the number of the open shared file, ``fd``, as ``model_loader_extra_config``."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._fd: int = load_config.model_loader_extra_config["fd"]
        self._default = DefaultModelLoader(replace(load_config, load_format="auto", model_loader_extra_config={}))

    def download_model(self, model_config: Any) -> None:
        """As vLLM does."""
        self._default.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """As vLLM does."""
        self._default.load_weights(model, model_config)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Return the model over the shared weights. Raises :class:`UnsupportedModelError` for a quantised one."""
        if model_config.quantization:
            raise UnsupportedModelError(
                f"model {model_config.model}: its weights are quantised ({model_config.quantization}), which vLLM's engines "
                "on a CPU cannot share; use mode sequential"
            )
        with set_default_torch_dtype(model_config.dtype), torch.device("cpu"):
            model: nn.Module = initialize_model(vllm_config, model_config=model_config, prefix=prefix)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            if os.fstat(self._fd).st_size == 0:
                self.load_weights(model, model_config)
                maybe_retie_word_embeddings(model, model_config)
                _fill(self._fd, model)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        linear = [module for module in model.modules() if _is_linear(module)]
        _bind(model, map_memory(os.fstat(self._fd).st_size, self._fd))
        _finish([module for module in model.modules() if module not in linear], model_config.dtype)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # of what the first engine has read
        model.eval()
        return model


def _tensors(model: nn.Module) -> Iterator[tuple[Any, str, Tensor]]:
    """Yield every parameter and buffer with its module and its name there, in an order that is the same in every engine;
    one that has several places, at each of them."""
    for module in model.modules():
        for named in (module._parameters, module._buffers):
            for name, tensor in list(named.items()):
                if tensor is not None:
                    yield module, name, tensor


def _is_linear(module: Any) -> bool:
    """Whether vLLM multiplies by the module's weight, which is as it was loaded, through its ``cpu_linear``. It does not by
    that of a convolution, which has three dimensions."""
    if not isinstance(getattr(module, "quant_method", None), (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)):
        return False
    return not getattr(module, "_cpu_skip_gemm_dispatch", False) and module.weight.ndim == 2


def _fill(fd: int, model: nn.Module) -> None:
    """Write the tensors of ``model`` to the file, and behind them their places, in the order of :func:`_tensors`."""
    copies: list[tuple[int, Tensor]] = []
    end = ALIGNMENT  # the first 8 bytes say where the places are

    def place(tensor: Tensor) -> int:
        nonlocal end
        at, end = end, end + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        copies.append((at, tensor))
        return at

    multiplied = {id(module.weight) for module in model.modules() if _is_linear(module)}
    read = {id(tensor) for module, _, tensor in _tensors(model) if _is_read(module)}
    places: dict[int, _Place] = {}
    for _, _, tensor in _tensors(model):
        if id(tensor) in places:
            continue
        data = tensor.detach().contiguous()
        if id(tensor) in multiplied and tensor.dtype in _PACKED:
            packed, layout = pack_weight(data)
            plain = place(data) if id(tensor) in read else None
            places[id(tensor)] = _Place(plain, place(packed), layout)
        else:
            places[id(tensor)] = _Place(place(data))
    index = pickle.dumps([places[id(tensor)] for _, _, tensor in _tensors(model)])
    os.ftruncate(fd, end + len(index))
    shared = map_memory(end + len(index), fd)
    use_pages(shared)
    for at, tensor in copies:
        shared[at : at + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
    shared[end:].copy_(torch.frombuffer(bytearray(index), dtype=torch.uint8))
    shared[:8].copy_(torch.tensor([end]).view(torch.uint8))


def _is_read(module: nn.Module) -> bool:
    """Whether the module's tensors are read as they are: not of linear layers, but of embeddings, which are looked up."""
    method = getattr(module, "quant_method", None)
    return not _is_linear(module) or isinstance(method, UnquantizedEmbeddingMethod)


def _bind(model: nn.Module, shared: Tensor) -> None:
    """Replace the tensors of ``model`` by those in the file."""
    start = int(shared[:8].view(torch.int64))
    places: list[_Place] = pickle.loads(shared[start:].numpy().tobytes())
    found = list(_tensors(model))
    if len(found) != len(places):
        raise RuntimeError(f"the shared weights are of {len(places)} tensors, and this engine's model has {len(found)}")
    bound: dict[int, Tensor] = {}
    for (module, name, tensor), place in zip(found, places, strict=True):
        if id(tensor) not in bound:
            if place.plain is None:
                data = torch.empty(0, dtype=tensor.dtype)
            else:
                data = shared[place.plain : place.plain + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            is_parameter = isinstance(tensor, nn.Parameter)
            bound[id(tensor)] = nn.Parameter(data, requires_grad=False) if is_parameter else data
        if name == "weight" and _is_linear(module):
            if place.packed is None:
                module.cpu_linear = nn.functional.linear
            else:
                shape = (tensor.shape[0], tensor.shape[1])
                weight = open_packed(shared.data_ptr() + place.packed, shape, place.layout, tensor.dtype)
                module.cpu_linear = _product(weight, shape[0])
        named = module._parameters if name in module._parameters else module._buffers
        named[name] = bound[id(tensor)]
    _kept.append(shared)


def _finish(modules: Sequence[Any], dtype: torch.dtype) -> None:
    """Do what vLLM does after loading to ``modules``, the model first: all but linear layers, of which it would make packed
    copies."""
    for module in modules:
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)
    for module in modules:
        if is_deferred_attention_layer(module):
            module.process_weights_after_loading(dtype)
    if hasattr(modules[0], "process_weights_after_loading"):
        modules[0].process_weights_after_loading()


_kept: list[Tensor] = []  # packed weights do not own their memory
_weights: list[Tensor] = []


@torch.library.custom_op("splitwiser::packed_linear", mutates_args=())
def _packed_linear(inputs: Tensor, bias: Tensor | None, number: int, outputs: int) -> Tensor:
    """Multiply by a packed weight, which the compiler cannot see into, by its number."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, _weights[number], bias, "none", [], "")
    return product


@_packed_linear.register_fake
def _(inputs: Tensor, bias: Tensor | None, number: int, outputs: int) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], outputs)


def _product(weight: Tensor, outputs: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    number = len(_weights)
    _weights.append(weight)
    return lambda inputs, _, bias: torch.ops.splitwiser.packed_linear(inputs, bias, number, outputs)
