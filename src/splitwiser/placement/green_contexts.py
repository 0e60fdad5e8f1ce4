"""CUDA green contexts: the device's multiprocessors cut in two, and streams that run on one of the parts.

Contexts are created through the CUDA driver's Python bindings, which PyTorch's CUDA builds install, and not through
``torch.cuda.green_contexts``: that takes each context's multiprocessors from the start of the whole device, so two of its
contexts overlap, and it does not report how many were granted. Here the device is cut once for each split (CUDA driver
API, "Green Contexts"). PyTorch uses the streams of green contexts as external streams.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from splitwiser.errors import InputError, RunError, first_line
from splitwiser.machine.device import resolve_device

OLDEST_DRIVER = 12050  # CUDA 12.5, the first with streams of green contexts


def find_problem(name: str) -> str | None:
    """Return why green contexts cannot be created on the device ``name``, on one line, or None if they can. Raises
    :class:`InputError` for an invalid name."""
    device = resolve_device(name)
    if device.type != "cuda":
        return f"green contexts divide an NVIDIA GPU's multiprocessors, and the device is {device}"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the CUDA driver's Python bindings are not installed; pip install cuda-bindings"
    try:
        from cuda.bindings import driver

        version = _call(driver.cuDriverGetVersion)
        if version < OLDEST_DRIVER:
            return f"the GPU driver supports CUDA {version // 1000}.{version % 1000 // 10}, and 12.5 is needed"
        torch.cuda.init()
        for context in cut_device(device, max(1, count_multiprocessors(device) // 2)):
            _call(driver.cuGreenCtxDestroy, context.handle)
    except (ImportError, RuntimeError, RunError, InputError) as error:
        return f"the CUDA driver makes no green contexts: {first_line(error)}"
    return None


@dataclass(frozen=True)
class GreenContext:
    """A green context and the number of multiprocessors that it was granted."""

    handle: Any
    sms: int

    def stream(self, device: torch.device, priority: int) -> torch.cuda.ExternalStream:
        """Return a new stream whose kernels run only on this context. Like PyTorch's, it lives as long as the process."""
        from cuda.bindings import driver

        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return torch.cuda.ExternalStream(
            int(_call(driver.cuGreenCtxStreamCreate, self.handle, flags, priority)), device
        )


def cut_device(device: torch.device, prefill_sms: int) -> tuple[GreenContext, GreenContext]:
    """Return two green contexts that divide the device, the first with about ``prefill_sms`` multiprocessors.

    The driver rounds up to the groups that the device can separate. Raises :class:`InputError` if that leaves none for
    the second, :class:`RunError` if the driver fails.
    """
    from cuda.bindings import driver

    resource = _sm_resource(device)
    pieces, _, rest = _call(driver.cuDevSmResourceSplitByCount, 1, resource, 0, prefill_sms)
    if not rest.sm.smCount:
        raise InputError(
            f"mode green: prefill at {prefill_sms} of {resource.sm.smCount} multiprocessors leaves decode none; the "
            f"device separates them in groups, so give prefill a smaller share"
        )
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    contexts = []
    for piece in (pieces[0], rest):
        description = _call(driver.cuDevResourceGenerateDesc, [piece], 1)
        handle = _call(driver.cuGreenCtxCreate, description, _device(device), flags)
        contexts.append(GreenContext(handle, int(piece.sm.smCount)))
    return contexts[0], contexts[1]


def count_multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``."""
    return int(_sm_resource(device).sm.smCount)


def _sm_resource(device: torch.device) -> Any:
    from cuda.bindings import driver

    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    return _call(driver.cuDeviceGetDevResource, _device(device), kind)


def _device(device: torch.device) -> Any:
    from cuda.bindings import driver

    return _call(driver.cuDeviceGet, device.index or 0)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a driver function and return its results. Raises :class:`RunError` with the function's and the error's name."""
    status, *results = function(*arguments)
    if int(status):
        raise RunError(f"CUDA driver: {function.__name__}: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)
