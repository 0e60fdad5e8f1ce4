"""What can be told before a run, in the words that refuse it; ``splitwiser doctor`` says the same."""

import importlib.util
import os
import shutil

import torch

from splitwiser.errors import first_line
from splitwiser.kv_pool import find_pool_problem
from splitwiser.shared import SharedMemory


def find_memory_problem(
    name: str, weights: int, dtype: torch.dtype, kv_memory: str, free: int, device: torch.device
) -> str | None:
    """Why ``weights`` bytes of model ``name`` and a KV pool of the size ``kv_memory`` are more than the ``free`` bytes of
    ``device``; None if they fit. With ``auto`` the pool takes what there is.

    Raises :class:`~splitwiser.errors.InputError` if ``kv_memory`` is not a size.
    """
    if weights > free:
        return (
            f"model {name}: its weights in {str(dtype).removeprefix('torch.')} take {weights / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are available on {device}; a smaller --dtype or model is needed"
        )
    return find_pool_problem(kv_memory, free - weights, " beside the weights")


def find_mode_problem(mode: str, device: torch.device) -> str | None:
    """Why ``mode`` does not work on ``device`` of this machine, or None. Asks nothing that takes long."""
    if mode in ("mps", "green") and device.type != "cuda":
        return f"mode {mode} needs an NVIDIA GPU, and the device is {device}"
    if mode in ("mp", "mps"):
        problem = find_memfd_problem()
        if problem:
            return f"mode {mode} cannot share memory between processes: {problem}"
    if mode == "mps":
        return find_mps_problem()
    return find_green_problem() if mode == "green" else None


def find_memfd_problem() -> str | None:
    """Why this process cannot make anonymous files, in which processes share memory; a sandbox may forbid the call."""
    try:
        SharedMemory(1, torch.device("cpu")).close()
    except OSError as error:
        return f"memfd_create: {os.strerror(error.errno) if error.errno else first_line(error)}"
    return None


MPS_BINARY = "nvidia-cuda-mps-control"


def find_mps_problem() -> str | None:
    """Why no MPS daemon can be started here."""
    return None if shutil.which(MPS_BINARY) else f"mode mps needs {MPS_BINARY}, which is not on PATH"


def find_green_problem() -> str | None:
    """Why no CUDA green context can be made here."""
    from torch.cuda import green_contexts

    bindings = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")
    if green_contexts.SUPPORTED or bindings:
        return None
    return f"mode green needs CUDA green contexts, which PyTorch {torch.__version__} was built without"
