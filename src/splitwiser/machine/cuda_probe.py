"""Prints the properties of the GPUs that the CUDA driver sees, as JSON.

Run as a program, so that the calling process does not initialise CUDA: an MPS client must know its daemon by then. It
uses only the driver's library (CUDA Driver API) and needs no package.
"""

import ctypes
import json
import uuid

_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _COMPUTE_MODE = 75, 76, 20  # CUdevice_attribute
LIBRARY = "libcuda.so.1"
COMPUTE_MODES = {0: "DEFAULT", 2: "PROHIBITED", 3: "EXCLUSIVE_PROCESS"}  # CUcomputemode, in the words of nvidia-smi -c


class CudaError(Exception):
    """A call to the driver failed."""


def find_driver_problem() -> str | None:
    """Return why this machine has no GPU that CUDA could use, or None if it has the driver's library. Loads the library
    and calls nothing in it, so CUDA is not initialised."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return f"the driver's {LIBRARY} cannot be loaded"
    return None


def probe() -> list[dict[str, object]]:
    """Return ``uuid``, ``name``, ``capability`` and ``compute_mode`` of each visible GPU, in CUDA's order. Raises
    :class:`CudaError`."""
    if problem := find_driver_problem():
        raise CudaError(problem)
    cuda = ctypes.CDLL(LIBRARY)

    def call(function: str, *arguments: object) -> None:
        code = getattr(cuda, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            cuda.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"{function}: {(text.value or b'unknown error').decode()} ({code})")

    def attribute(device: ctypes.c_int, which: int) -> int:
        value = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    call("cuInit", 0)
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    gpus: list[dict[str, object]] = []
    for index in range(count.value):
        device, name, identity = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDeviceGetName", name, len(name), device)
        call("cuDeviceGetUuid_v2", identity, device)  # v2: that of the MIG instance, if there is one
        described = name.value.decode(errors="replace")
        gpus.append(
            {
                "uuid": f"{'MIG' if ' MIG ' in described else 'GPU'}-{uuid.UUID(bytes=identity.raw)}",
                "name": described,
                "capability": [attribute(device, _CAPABILITY_MAJOR), attribute(device, _CAPABILITY_MINOR)],
                "compute_mode": COMPUTE_MODES.get(attribute(device, _COMPUTE_MODE), "unknown"),
            }
        )
    return gpus


if __name__ == "__main__":
    try:
        print(json.dumps({"gpus": probe()}))
    except CudaError as error:
        print(json.dumps({"error": str(error)}))
