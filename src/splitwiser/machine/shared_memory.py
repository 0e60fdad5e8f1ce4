"""Memory that processes share: weights and pool exist once, however many workers map them."""

import ctypes
import io
import mmap
import os
import pickle
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from multiprocessing import reduction
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor

from splitwiser.machine.process import use_huge_pages

_ALIGNMENT = 64  # bytes; a cache line, and what vector loads like

_COUNTER_HANDLE, _COUNTER_OFFSET = 11, 12  # among what torch's rebuild_cuda_tensor is given

_Place = tuple[int, int]  # which memory, and the byte in it


class SharedMemory:
    """Zeroed memory that is shared by sending this object to a process as it starts.

    On a CPU it is an anonymous file (memfd): no name that a killed run could leave behind, no ``/dev/shm`` whose size a
    container limits, and pages cost nothing until they are used. On a GPU it is one CUDA allocation, sent as its CUDA-IPC
    handle by torch.multiprocessing and opened when ``tensor`` is first asked for: until then the receiver has not
    initialised CUDA, and can still set what CUDA reads then.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._fd: int | None = None
        self._counters: list[tuple[bytes, int]] = []  # PyTorch's, one for each receiver, which it keeps the memory for
        if device.type == "cuda":
            tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        else:
            self._fd = os.memfd_create("splitwiser", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, nbytes)
            tensor = _mapped(self._fd, nbytes)
        self._open: Callable[[], Tensor] = lambda: tensor

    @cached_property
    def tensor(self) -> Tensor:
        """All of the memory, as uint8."""
        return self._open()

    def __reduce__(self) -> tuple[Callable[..., "SharedMemory"], tuple[object, ...]]:
        if self._fd is None:
            rebuild, arguments = reduce_tensor(self.tensor)
            if self.tensor.is_cuda and self.tensor.numel():  # of nothing, nothing is counted
                self._counters.append(arguments[_COUNTER_HANDLE : _COUNTER_OFFSET + 1])
            return _opened, (rebuild, arguments)
        return _received, (reduction.DupFd(self._fd), self.tensor.nbytes)

    @classmethod
    def of(cls, tensor: Tensor) -> "SharedMemory":
        """The memory that a contiguous CUDA ``tensor`` lies in."""
        flat = tensor.view(-1).view(torch.uint8)
        return _opened(lambda: flat, ())

    def forget_receivers(self) -> None:
        """Say for the receivers, which have ended, that they use the memory no more. A process that is ended does not say so
        itself, and PyTorch would keep GPU memory that it has sent for ever (torch/csrc/CudaIPCTypes.cpp, "limbo")."""
        for handle, offset in self._counters:
            torch.UntypedStorage._release_ipc_counter(handle, offset, device=self.tensor.device)
        self._counters.clear()

    def close(self) -> None:
        """Give up the handle; the memory goes when the last tensor over it has gone, in every process."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _SentFd(Protocol):
    """What ``multiprocessing.reduction.DupFd`` arrives as."""

    def detach(self) -> int: ...


def _mapped(fd: int, nbytes: int) -> Tensor:
    memory = mmap.mmap(fd, nbytes)
    use_huge_pages(memory)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _opened(rebuild: Callable[..., Tensor], arguments: tuple[object, ...]) -> SharedMemory:
    shared = SharedMemory.__new__(SharedMemory)
    shared._fd = None
    shared._counters = []
    shared._open = partial(rebuild, *arguments)
    return shared


def _received(fd: "_SentFd", nbytes: int) -> SharedMemory:
    number = fd.detach()
    try:
        tensor = _mapped(number, nbytes)
    finally:
        os.close(number)
    return _opened(lambda: tensor, ())


class SharedModule:
    """A module whose weights and buffers lie in memory that processes share.

    On a CPU making it moves the tensors of ``module`` into one :class:`SharedMemory`, one by one, so that a second copy
    never exists as a whole; on a GPU they are shared where they lie. Sending it to a process and calling :meth:`open`
    there gives the same module over the same memory.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
        places: dict[int, _Place] = {}
        self.memories: list[SharedMemory] = []
        if device.type == "cuda":
            for key, tensor in tensors.items():
                places[key] = len(self.memories), 0
                tensor.data = tensor.detach().contiguous()
                self.memories.append(SharedMemory.of(tensor.data))
        else:
            total = 0
            for key, tensor in tensors.items():
                places[key] = 0, total
                total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            self.memories.append(SharedMemory(max(total, 1), device))
            for key, tensor in tensors.items():
                place = _view(self.memories[0].tensor, places[key][1], tensor.shape, tensor.dtype)
                place.copy_(tensor.detach())
                tensor.data = place
            _return_freed_memory()
        buffer = io.BytesIO()
        _Pickler(buffer, places).dump(module)
        self._skeleton = buffer.getvalue()

    def open(self) -> nn.Module:
        """The module, over the shared memory."""
        module: nn.Module = _Unpickler(io.BytesIO(self._skeleton), self.memories).load()
        return module


def _return_freed_memory() -> None:
    """Have the C library give freed memory back to the system; it would keep the weights' old places for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not need it
    if trim is not None:
        trim(0)


def _view(memory: Tensor, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return memory[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Writes a module with each shared tensor as its place."""

    def __init__(self, file: io.BytesIO, places: dict[int, _Place]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._places = places

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, Tensor) or id(value) not in self._places:
            return None
        return self._places[id(value)], tuple(value.shape), value.dtype, isinstance(value, nn.Parameter)


class _Unpickler(pickle.Unpickler):
    """Reads what :class:`_Pickler` wrote; a tensor that several modules hold (tied weights) is one object again."""

    def __init__(self, file: io.BytesIO, memories: Sequence[SharedMemory]) -> None:
        super().__init__(file)
        self._memories = memories
        self._opened: dict[_Place, Tensor] = {}

    def persistent_load(self, written: tuple[_Place, tuple[int, ...], torch.dtype, bool]) -> Tensor:
        place, shape, dtype, is_parameter = written
        if place not in self._opened:
            number, offset = place
            tensor = _view(self._memories[number].tensor, offset, torch.Size(shape), dtype)
            self._opened[place] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return self._opened[place]
