"""The likeliest token of each request."""

from functools import cache

import torch
from torch import Tensor

from splitwiser.model.kernels.build import load_native


def likeliest(logits: Tensor) -> Tensor:
    """Return the place of the largest number of each row of ``logits``, (rows, vocabulary), the first of equal ones: int64,
    (rows,), on the same device.

    PyTorch's argmax of half precisions takes five times as long on a CPU as that of float32. A compiled one reads bfloat16
    as it is; others are converted.
    """
    if logits.is_cuda or logits.dtype == torch.float32:
        return logits.argmax(dim=-1)
    if logits.dtype != torch.bfloat16 or not logits.is_contiguous() or not (library := _library()):
        return logits.float().argmax(dim=-1)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    library.argmax(logits.data_ptr(), tokens.data_ptr(), *logits.shape, torch.get_num_threads())
    return tokens


_library = cache(lambda: load_native()[0])
