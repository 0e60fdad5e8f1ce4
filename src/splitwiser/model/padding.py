"""Padded batches of prompts for transformers' own generation."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


def pad(prompts: Sequence[Sequence[int]], device: torch.device, side: Side) -> tuple[Tensor, Tensor]:
    """Return the token ids of ``prompts``, padded on ``side``, and their mask (1: token, 0: padding), each int64 of shape
    (prompts, longest prompt) on ``device``."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        own = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, own] = torch.tensor(prompt)
        mask[row, own] = 1
    return ids.to(device), mask.to(device)
