"""What reads the KV pool in decode steps: a kernel for the device at hand, or plain PyTorch where there is none."""

from typing import Protocol

import torch
from torch import Tensor

from splitwiser.cpu_kernel import load_cpu_kernel
from splitwiser.errors import unknown
from splitwiser.gpu_kernel import load_gpu_kernel

KERNELS = ("auto", "plain")


class DecodeKernel(Protocol):
    """Attention of one new token a request over the pool."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        starts: Tensor,
        lengths: Tensor,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``query`` (requests, heads, key size) to each request's positions ``starts`` to ``lengths`` - 1.

        ``keys`` and ``values`` are a layer of the pool, (blocks, block tokens, kv heads, head size); ``tables`` (requests,
        blocks), ``starts`` and ``lengths`` (requests,) are int64. Returns (requests, heads, value size).
        """
        ...


def load_kernel(choice: str, device: torch.device) -> tuple[DecodeKernel | None, str]:
    """The kernel and a line for the run's record; None, and the reason, where plain PyTorch is used instead.

    ``choice`` is ``auto`` or ``plain``. Raises :class:`~splitwiser.errors.InputError` for another.
    """
    if choice not in KERNELS:
        raise unknown("kernels", choice, KERNELS)
    if choice == "plain":
        return None, "plain PyTorch (as asked for)"
    return load_cpu_kernel() if device.type == "cpu" else load_gpu_kernel()
