"""Memory that is available, on a GPU or in main memory within a container's limit."""

from pathlib import Path

import psutil
import torch

from splitwiser.machine import cgroup


def free_memory(device: torch.device) -> int:
    """Return the bytes that are available on ``device`` now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def available_memory(root: Path = cgroup.ROOT, membership: Path = cgroup.MEMBERSHIP) -> int:
    """Return the bytes of main memory that are available without swapping, within a container's limit."""
    headroom = cgroup.memory_headroom(root, membership)
    available: int = psutil.virtual_memory().available
    return available if headroom is None else min(available, headroom)
