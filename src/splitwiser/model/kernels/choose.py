"""The choice of ``--kernels``: by name, what loads the kernels of a KV pool."""

from collections.abc import Callable, Sequence

import torch

from splitwiser.errors import unknown_name
from splitwiser.model.kernels.cpu_attention import load_cpu_kernels
from splitwiser.model.kernels.gpu_attention import load_gpu_kernels
from splitwiser.model.kernels.interface import LayerShape, PoolKernels

Loader = Callable[[torch.device, torch.dtype, Sequence[LayerShape]], tuple[PoolKernels, dict[str, str]]]


def _load_compiled(
    device: torch.device, dtype: torch.dtype, layers: Sequence[LayerShape]
) -> tuple[PoolKernels, dict[str, str]]:
    return load_cpu_kernels(dtype, layers) if device.type == "cpu" else load_gpu_kernels(dtype, layers)


def _load_plain(*_: object) -> tuple[PoolKernels, dict[str, str]]:
    return PoolKernels(), dict.fromkeys(("prefill_attention", "decode_attention"), "plain PyTorch (as asked for)")


LOADERS: dict[str, Loader] = {"auto": _load_compiled, "plain": _load_plain}


def load_kernels(
    choice: str, device: torch.device, dtype: torch.dtype, layers: Sequence[LayerShape]
) -> tuple[PoolKernels, dict[str, str]]:
    """Return the kernels for a pool of ``layers`` in ``dtype`` on ``device``, and descriptions for the run's record of
    what computes attention in prefill and in decode, with the reason where it is plain PyTorch.

    ``choice`` is a name in :data:`LOADERS`. Raises :class:`~splitwiser.errors.InputError` for another.
    """
    if choice not in LOADERS:
        raise unknown_name("--kernels", choice, LOADERS)
    return LOADERS[choice](device, dtype, layers)
