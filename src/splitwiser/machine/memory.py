"""How much memory can be had, on a GPU or within what a container lets this process have."""

from pathlib import Path

import psutil
import torch

from splitwiser.machine import cgroup


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be had on ``device`` now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def available_memory(root: Path = cgroup.ROOT, membership: Path = cgroup.MEMBERSHIP) -> int:
    """Return the bytes of main memory that can be had without swapping, within what a container lets this process have."""
    room = cgroup.memory_room(root, membership)
    there: int = psutil.virtual_memory().available
    return there if room is None else min(there, room)
