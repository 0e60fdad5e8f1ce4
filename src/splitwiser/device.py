"""Which device a run uses, and its memory between two models."""

import gc

import torch

from splitwiser.errors import InputError


def resolve_device(device: str, gpus: int | None = None) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` names where there are ``gpus`` GPUs (asked of PyTorch if not
    given). Raises :class:`InputError` if it is not there."""
    kind, _, number = device.partition(":")
    if device != "auto" and (
        kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number)
    ):
        raise InputError(f"device '{device}': must be auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if gpus is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda", 0) if gpus else torch.device("cpu")
    if not gpus:
        raise InputError(f"device '{device}': PyTorch {torch.__version__} finds no GPU here; use --device cpu")
    if int(number or 0) >= gpus:
        raise InputError(f"device '{device}': there are {gpus} GPUs, numbered from 0")
    return torch.device("cuda", int(number or 0))


def release_memory() -> None:
    """Give back what models that are gone held, before the next is loaded and its pool sized by what is free."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
