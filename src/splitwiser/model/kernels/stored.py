"""How a KV pool stores keys and values: as they are, or as int8 with a scale for each."""

import torch
from torch import Tensor

SCALE_BYTES = 4  # a float32


def stored_size(size: int, dtype: torch.dtype) -> int:
    """Return how many numbers of ``dtype`` a key or a value of ``size`` numbers takes in a pool."""
    return size + SCALE_BYTES if dtype == torch.int8 else size


def quantise(numbers: Tensor) -> Tensor:
    """Return ``numbers`` (..., size) as int8 (..., size + SCALE_BYTES): whole multiples, from -127 to 127, of a scale, whose
    bytes as float32 follow them."""
    numbers = numbers.float()
    scales = numbers.abs().amax(dim=-1, keepdim=True) / 127
    whole = (numbers / scales).nan_to_num().round().to(torch.int8)  # all are zero where the scale is
    return torch.cat([whole, scales.view(torch.int8)], dim=-1)


def dequantise(stored: Tensor) -> Tensor:
    """Return the numbers, float32 (..., size), of what :func:`quantise` has returned."""
    whole, scales = stored[..., :-SCALE_BYTES], stored[..., -SCALE_BYTES:]
    return whole * scales.contiguous().view(torch.float32)
