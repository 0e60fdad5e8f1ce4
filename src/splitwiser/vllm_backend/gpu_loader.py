"""vLLM's load format ``splitwiser`` on a GPU: engines over one copy of the weights. Runs in vLLM's environment.

The first engine loads its weights as vLLM does, and the others map them by CUDA IPC, as vLLM's own format ``ipc_cache`` maps
those of a process ``vllm preload``. That one is not used: it would be a process more with a CUDA context, which finds its
engines by a socket and outlives its parent.
"""

from dataclasses import replace
from typing import Any

from torch import nn
from vllm.model_executor.model_loader.weight_cache.daemon import export_entries
from vllm.model_executor.model_loader.weight_cache.ipc_loader import IpcModelLoader
from vllm.model_executor.model_loader.weight_cache.protocol import (
    UnsupportedQuantForIPCError,
    WeightCacheState,
    check_ipc_quant_support,
)
from vllm.model_executor.model_loader.weight_cache.utils import export_model_attrs

from splitwiser.errors import UnsupportedModelError
from splitwiser.vllm_backend.sharing import read_handles, write_handles


class GpuSharedLoader(IpcModelLoader):
    """See the module. Takes the number of the open shared file, ``fd``, as ``model_loader_extra_config``."""

    def __init__(self, load_config: Any) -> None:
        self._fd: int = load_config.model_loader_extra_config["fd"]
        super().__init__(replace(load_config, model_loader_extra_config={}))

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Return 0: how much memory an engine takes is not measured, since the size of its KV cache is given."""
        return 0

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Return the model over the shared weights. Raises :class:`UnsupportedModelError` for one that is quantised in a way
        that vLLM cannot share."""
        try:
            state = read_handles(self._fd)
            if state is not None:
                shared: nn.Module = self._build_model(vllm_config, model_config, prefix, state)
                return shared
            model: nn.Module = self._fallback_load(vllm_config, model_config, prefix)
            check_ipc_quant_support(model)
        except UnsupportedQuantForIPCError as error:
            raise UnsupportedModelError(
                f"model {model_config.model}: vLLM's engines cannot share its weights ({error}); use mode sequential"
            ) from error
        write_handles(self._fd, WeightCacheState(*export_entries(model), export_model_attrs(model)))
        return model
