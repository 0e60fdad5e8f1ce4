"""Checks whether a mode works on this machine, for runs and for ``splitwiser doctor``, with the same messages."""

import os
from importlib import import_module

from splitwiser.errors import InputError, first_line
from splitwiser.machine.cuda_probe import find_driver_problem
from splitwiser.machine.process import find_children_problem
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.modes import find_backend, find_mode


def find_mode_problem(mode: str, device: str) -> str | None:
    """Return why ``mode`` does not work on ``device`` (``auto``, ``cpu``, ``cuda`` or ``cuda:N``) of this machine, or None.

    Does not initialise CUDA for mode ``mps``. Raises :class:`~splitwiser.errors.InputError` for any other device name.
    """
    chosen = find_mode(mode)
    if chosen.needs_gpu and device == "cpu":
        return "needs an NVIDIA GPU, and the device is cpu"
    if problem := find_missing_gpu(mode):
        return problem
    if chosen.shares_memory:
        if problem := find_children_problem():
            return problem
        if problem := find_memfd_problem():
            return f"cannot share memory between processes: {problem}"
    if not chosen.checked_by:
        return None
    # imported only for this mode: what other modes need may be missing
    found: str | None = import_module(f"splitwiser.placement.{chosen.checked_by}").find_problem(device)
    return found


def find_missing_gpu(mode: str) -> str | None:
    """Return why ``mode`` cannot run on a machine without a GPU's driver, if it needs one and this is such a machine; None
    otherwise. Needs no PyTorch."""
    if find_mode(mode).needs_gpu and (problem := find_driver_problem()):
        return f"there is no NVIDIA GPU here ({problem})"
    return None


def refuse_mode_here(mode: str, device: str) -> None:
    """Raise :class:`InputError`, with the reason and a mode to use instead, if this machine cannot run ``mode``."""
    if problem := find_mode_problem(mode, device):
        raise InputError(f"mode {mode}: {problem}; use mode {'sequential' if mode == 'mp' else 'mp'}")


def check_backend(config: EngineConfig) -> None:
    """Raise :class:`InputError` if ``config``'s back end is not on this machine."""
    if package := find_backend(config.backend).package:
        import_module(f"{package}.environment").check(config)


def find_memfd_problem() -> str | None:
    """Return why this process cannot create anonymous files, through which processes share memory, or None. A sandbox may
    forbid the call."""
    try:
        os.close(os.memfd_create("splitwiser", os.MFD_CLOEXEC))
    except OSError as error:
        return f"memfd_create: {os.strerror(error.errno) if error.errno else first_line(error)}"
    return None
