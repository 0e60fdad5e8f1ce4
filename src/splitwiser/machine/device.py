"""The device of a run, and releasing its memory between two models."""

import gc
import os

import torch

from splitwiser.errors import InputError
from splitwiser.text import parse_device

# Read when CUDA is initialised, which counting devices does. With the default of 8 queues, several streams share one, and
# decode's launches wait behind prefill's (cuda.h, "Green Contexts"); mode green has up to 16 streams, and 32 queues are the
# driver's maximum.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def resolve_device(device: str, gpus: int | None = None) -> torch.device:
    """Return the device ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` on a machine with ``gpus`` GPUs (by default those that
    PyTorch finds). Raises :class:`InputError` for any other name, or if the device does not exist."""
    kind, number = parse_device(device)
    if kind == "cpu":
        return torch.device("cpu")
    if gpus is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda", 0) if gpus else torch.device("cpu")
    if not gpus:
        raise InputError(f"--device '{device}': PyTorch {torch.__version__} finds no GPU here; use --device cpu")
    if (number or 0) >= gpus:
        raise InputError(f"--device '{device}': there are {gpus} GPUs, numbered from 0")
    return torch.device("cuda", number or 0)


def release_memory() -> None:
    """Release the memory of deleted models, before the next is loaded and its KV pool sized by what is free."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
