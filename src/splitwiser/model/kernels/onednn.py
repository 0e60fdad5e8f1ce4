"""Weights packed into the layout of oneDNN's matrix products, as bytes that may lie anywhere.

A packed weight is bytes in a layout that oneDNN chooses. PyTorch opens them through the C interface that its ahead-of-time
compiler uses for the same purpose (torch/csrc/inductor/aoti_torch/c/shim.h).
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def pack_weight(weight: Tensor) -> tuple[Tensor, bytes]:
    """Return a packed copy of a linear layer's ``weight`` (outputs, inputs), as uint8, and the layout it is in."""
    opaque = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(opaque).tolist())
    copied = torch.empty(torch.ops.mkldnn._nbytes(opaque), dtype=torch.uint8)
    handle = ctypes.c_void_p(_pointer(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(opaque)))
    address = ctypes.c_void_p()
    try:
        _check(_library().aoti_torch_get_data_ptr(handle, ctypes.byref(address)))
        assert address.value is not None
        ctypes.memmove(copied.data_ptr(), address.value, copied.nbytes)
    finally:
        _check(_library().aoti_torch_delete_tensor_object(handle))
    return copied, layout


def open_packed(address: int, shape: tuple[int, int], layout: bytes, dtype: torch.dtype) -> Tensor:
    """Return the weight of ``shape`` and ``dtype`` (bfloat16 or float32) that lies packed at ``address``, for
    ``torch.ops.mkldnn._linear_pointwise``; it does not own the memory."""
    library = _library()
    kinds = {torch.bfloat16: library.aoti_torch_dtype_bfloat16, torch.float32: library.aoti_torch_dtype_float32}
    sizes, strides = (ctypes.c_int64 * 2)(*shape), (ctypes.c_int64 * 2)(shape[1], 1)
    handle = ctypes.c_void_p()
    _check(
        library.aoti_torch_create_tensor_from_blob_v2(
            ctypes.c_void_p(address), ctypes.c_int64(2), sizes, strides, ctypes.c_int64(0),
            kinds[dtype](), library.aoti_torch_device_type_cpu(), 0, ctypes.byref(handle),
            library.aoti_torch_layout__mkldnn(), layout, ctypes.c_int64(len(layout)),
        )
    )  # fmt: skip
    opened: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule(handle))
    return opened


def _check(status: int) -> None:
    if status:
        raise RuntimeError("PyTorch's C interface refused a call")


def _pointer(capsule: object) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(capsule, None))


def _capsule(handle: ctypes.c_void_p) -> Any:  # noqa: ANN401  # PyTorch's types say void pointer, but it needs a capsule
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(handle, None, None)
