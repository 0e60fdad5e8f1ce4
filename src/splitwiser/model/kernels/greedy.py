"""The likeliest token of each request."""

import ctypes

import torch
from torch import Tensor


def likeliest(logits: Tensor) -> Tensor:
    """See :class:`~splitwiser.model.kernels.interface.LikeliestKernel`. By PyTorch, whose argmax of half precisions takes
    five times as long on a CPU as that of float32."""
    return (logits if logits.is_cuda else logits.float()).argmax(dim=-1)


class CpuLikeliest:
    """The function ``argmax`` of csrc/fused.cpp, which reads bfloat16 as it is, as a
    :class:`~splitwiser.model.kernels.interface.LikeliestKernel`; logits of other types are PyTorch's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.argmax

    def __call__(self, logits: Tensor) -> Tensor:
        """See :meth:`splitwiser.model.kernels.interface.LikeliestKernel.__call__`."""
        if logits.dtype != torch.bfloat16:
            return likeliest(logits)
        logits = logits.contiguous()
        tokens = torch.empty(len(logits), dtype=torch.int64)
        self._function(logits.data_ptr(), tokens.data_ptr(), *logits.shape, torch.get_num_threads())
        return tokens
