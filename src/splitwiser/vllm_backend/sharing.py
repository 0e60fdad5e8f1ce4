"""How engines share memory: on a CPU, an anonymous file that they map; on a GPU, memory of the first engine that opens the
file, which the others map by CUDA IPC, with the handles in the file. Runs in vLLM's environment.

So all else is the same on both devices: the parent makes empty files, and engines start one after another. On a GPU memory
must outlast what others do with it, so they end in reverse order.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitwiser.machine.pages import map_memory
from splitwiser.machine.shared_memory import SharedMemory
from splitwiser.vllm_backend.messages import SharedFile


def open_pool(file: SharedFile, device: torch.device) -> Tensor:
    """Return the memory on ``device`` that ``file`` stands for, uint8 of its size; zeros where this engine is the first."""
    if device.type == "cpu":
        os.ftruncate(file.fd, file.nbytes)
        return map_memory(file.nbytes, file.fd)
    memory = read_handles(file.fd)
    if memory is None:
        memory = SharedMemory(file.nbytes, device)
        write_handles(file.fd, memory)
    assert isinstance(memory, SharedMemory)
    return memory.tensor


def write_handles(fd: int, handles: object) -> None:
    """Write ``handles``, which can be pickled, to the file ``fd`` for the other engines.

    They may open them any number of times: PyTorch's counter of receivers is for a sender that frees its memory, and the
    first engine keeps it to its end."""
    _path(fd).write_bytes(pickle.dumps(handles))


def read_handles(fd: int) -> Any:  # noqa: ANN401  # what was written
    """Return what the first engine wrote to the file ``fd``; None if it has written nothing yet."""
    content = _path(fd).read_bytes()
    return pickle.loads(content) if content else None


def _path(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}")  # opened anew: engines share the position in ``fd`` itself
