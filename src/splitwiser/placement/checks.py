"""Whether a mode works on this machine, in the words that refuse a run; ``splitwiser doctor`` says the same."""

import os

import torch

from splitwiser.errors import first_line
from splitwiser.machine.device import resolve_device
from splitwiser.machine.process import find_children_problem
from splitwiser.machine.shared_memory import SharedMemory
from splitwiser.placement import green_contexts
from splitwiser.placement import mps_daemon as mps
from splitwiser.placement.modes import MODES


def find_mode_problem(mode: str, device: str) -> str | None:
    """Why ``mode`` does not work on ``device`` (``auto``, ``cpu``, ``cuda`` or ``cuda:N``) of this machine, or None.

    Does not initialise CUDA for mode ``mps``. Raises :class:`~splitwiser.errors.InputError` on another form of device.
    """
    if MODES[mode].needs_gpu and device == "cpu":
        return "needs an NVIDIA GPU, and the device is cpu"
    if MODES[mode].shares_memory:
        if problem := find_children_problem():
            return problem
        if problem := find_memfd_problem():
            return f"cannot share memory between processes: {problem}"
    if mode == "mps":
        return mps.find_problem(mps.gpu_index(device))
    if mode == "green":
        return green_contexts.find_problem(resolve_device(device))
    return None


def find_memfd_problem() -> str | None:
    """Why this process cannot make anonymous files, in which processes share memory; a sandbox may forbid the call."""
    try:
        SharedMemory(1, torch.device("cpu")).close()
    except OSError as error:
        return f"memfd_create: {os.strerror(error.errno) if error.errno else first_line(error)}"
    return None
