"""The choice of ``--kernels``: by name, what loads the kernels of a KV pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names are checked before PyTorch, which takes seconds to import
    import torch

    from splitwiser.model.kernels.interface import LayerShape, PoolKernels

    Loader = Callable[[torch.device, torch.dtype, Sequence[LayerShape]], tuple[PoolKernels, dict[str, str]]]


def _load_compiled(
    device: torch.device, dtype: torch.dtype, layers: Sequence[LayerShape]
) -> tuple[PoolKernels, dict[str, str]]:
    if device.type == "cpu":
        from splitwiser.model.kernels.cpu_attention import load_cpu_kernels

        return load_cpu_kernels(dtype, layers)
    from splitwiser.model.kernels.gpu_attention import load_gpu_kernels

    return load_gpu_kernels(dtype, layers)


def _load_plain(*_: object) -> tuple[PoolKernels, dict[str, str]]:
    from splitwiser.model.kernels.interface import PoolKernels

    return PoolKernels(), dict.fromkeys(("prefill_attention", "decode_attention"), "plain PyTorch (as asked for)")


LOADERS: dict[str, Loader] = {"auto": _load_compiled, "plain": _load_plain}


def load_kernels(
    choice: str, device: torch.device, dtype: torch.dtype, layers: Sequence[LayerShape]
) -> tuple[PoolKernels, dict[str, str]]:
    """Return the kernels for a pool of ``layers`` in ``dtype`` on ``device``, and descriptions for the run's record of
    what computes attention in prefill and in decode, with the reason where it is plain PyTorch.

    ``choice`` is a name in :data:`LOADERS`.
    """
    return LOADERS[choice](device, dtype, layers)
