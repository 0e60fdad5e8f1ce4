"""PyTorch's settings for attention."""

import torch

from splitwiser.model import attention


def test_cudnns_attention_is_off() -> None:
    assert attention.NAME  # imported, which switches it off: its plans take tenths of a second per length
    assert not torch.backends.cuda.cudnn_sdp_enabled()
