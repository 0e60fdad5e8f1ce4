"""Which kernels serve a pool: those for the device at hand, or plain PyTorch where there are none."""

from collections.abc import Sequence

import torch

from splitwiser.errors import unknown
from splitwiser.model.kernels.cpu_attention import load_cpu_kernels
from splitwiser.model.kernels.gpu_attention import load_gpu_kernels
from splitwiser.model.kernels.interface import PoolKernels
from splitwiser.model.kv_pool import LayerShape

KERNELS = ("auto", "plain")


def load_kernels(
    choice: str, device: torch.device, dtype: torch.dtype, layers: Sequence[LayerShape]
) -> tuple[PoolKernels, dict[str, str]]:
    """The kernels for a pool of ``layers`` in ``dtype``, and what attends in prefill and in decode in words for the run's
    record, with the reason where it is plain PyTorch.

    ``choice`` is ``auto`` or ``plain``. Raises :class:`~splitwiser.errors.InputError` for another.
    """
    if choice not in KERNELS:
        raise unknown("kernels", choice, KERNELS)
    if choice == "plain":
        return PoolKernels(), dict.fromkeys(("prefill_attention", "decode_attention"), "plain PyTorch (as asked for)")
    return load_cpu_kernels(dtype, layers) if device.type == "cpu" else load_gpu_kernels(dtype, layers)
