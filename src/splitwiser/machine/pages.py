"""The pages of memory that a CPU reads weights, keys and values from: of 2 MiB where the system has them. Of pages of 4 KiB
the processor has to look up many more addresses, and what fetches ahead of a program stops at the end of each."""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

HUGE = 2 << 20  # bytes; of x86, and of Arm with pages of 4 KiB
ALIGNMENT = 64  # bytes of a tensor in gathered memory: a cache line, and good for vector loads

_NOTHING, _ANYWHERE, _FAILED = 0, None, ctypes.c_void_p(-1).value
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # from <linux/mman.h>, as what follows
_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25  # since Linux 5.14 and 6.1
_KEPT_AT_MOST = 64 << 20  # bytes of moved tensors, until the C library is told to return them
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>


def map_memory(nbytes: int, fd: int | None = None) -> Tensor:
    """Return ``nbytes`` bytes as uint8: of the file ``fd``, shared with all who map it, or zeros of this process alone. They
    take no memory until they are used. Raises OSError."""
    room = nbytes + HUGE  # in which there is an address where a huge page can begin
    start = _map(_ANYWHERE, room, _NOTHING, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    address, access = -(-start // HUGE) * HUGE, mmap.PROT_READ | mmap.PROT_WRITE
    memory = (ctypes.c_char * nbytes).from_address(address)
    unmapping = weakref.finalize(memory, _libc().munmap, start, room)
    unmapping.atexit = False  # tensors may be read until the process has ended
    if fd is None:
        _map(address, nbytes, access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1)
    else:
        _map(address, nbytes, access, mmap.MAP_SHARED | _MAP_FIXED, fd)
    _libc().madvise(address, nbytes, mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def use_pages(memory: Tensor) -> None:
    """Give ``memory``, in what :func:`map_memory` has returned, its pages now rather than at their first use, which takes
    microseconds each, and huge ones as far as the system can; what is in them stays. Does nothing before Linux 5.14."""
    start, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    first, last = -(-start // HUGE) * HUGE, end // HUGE * HUGE
    if first < last:
        for address in range(first, last, HUGE):  # a huge page takes the place of others, if only of one
            _libc().madvise(address, mmap.PAGESIZE, _MADV_POPULATE_WRITE)
        _libc().madvise(first, last - first, _MADV_COLLAPSE)
    start -= start % mmap.PAGESIZE
    _libc().madvise(start, end - start, _MADV_POPULATE_WRITE)


def _map(address: int | None, nbytes: int, access: int, flags: int, fd: int) -> int:
    """Return where mmap(2) has mapped ``nbytes`` bytes. Raises OSError."""
    mapped: int = _libc().mmap(address, nbytes, access, flags, fd, 0)
    if mapped == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return mapped


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = [address, size, number, number, number, ctypes.c_long], address
    libc.munmap.argtypes = [address, size]
    libc.madvise.argtypes = [address, size, number]
    return libc


def gather(module: nn.Module, allocate: Callable[[int], Tensor] = map_memory) -> dict[int, int]:
    """Move the weights and buffers of ``module`` into one memory, which ``allocate`` returns for its bytes, one by one, so
    that no complete second copy ever exists. Returns where in it each lies, by the tensor's ``id``."""
    tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    places: dict[int, int] = {}
    total = 0
    for key, tensor in tensors.items():
        places[key] = total
        total += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    memory = allocate(max(total, 1))
    paged = kept = 0  # bytes that have their pages, and bytes that the C library may still hold
    with torch.inference_mode():  # which some tensors were made in, and can only be changed in
        for key, tensor in tensors.items():
            end = -(-(places[key] + tensor.nbytes) // HUGE) * HUGE
            if paged < end:
                use_pages(memory[paged:end])
                paged = end
            place = view(memory, places[key], tensor.shape, tensor.dtype).copy_(tensor.detach())
            tensor.set_(place.untyped_storage(), place.storage_offset(), place.shape, place.stride())
            kept += tensor.nbytes
            if kept > _KEPT_AT_MOST:
                return_freed_memory()
                kept = 0
    return_freed_memory()
    return places


def view(memory: Tensor, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the tensor of ``shape`` and ``dtype`` that lies in ``memory`` from byte ``offset`` on."""
    return memory[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def return_freed_memory() -> None:
    """Make the C library return freed memory to the system; otherwise it keeps that of the moved weights."""
    trim = getattr(_libc(), "malloc_trim", None)  # glibc has it, musl does not need it
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for later allocations. Otherwise it returns the tens of megabytes that each layer
    frees to the system, which zeroes them again: a tenth of a prefill step's time."""
    set_option = getattr(_libc(), "mallopt", None)  # glibc has it
    if set_option is not None:
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)
        set_option(_M_MMAP_THRESHOLD, 2**25)  # its maximum
