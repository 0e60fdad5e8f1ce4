"""Left-padded batches of prompts for transformers' own generation."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the token ids of ``prompts`` and their mask (1: token, 0: padding), each int64 of shape (prompts, longest
    prompt) on ``device``."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
