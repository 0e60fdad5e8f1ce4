"""Memory shared between processes, so that weights and KV pool exist once for all workers."""

import io
import os
import pickle
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from multiprocessing import reduction
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor

from splitwiser.machine.pages import gather, map_memory, view

_COUNTER_HANDLE, _COUNTER_OFFSET = 11, 12  # positions in the arguments of torch's rebuild_cuda_tensor

_Place = tuple[int, int]  # index of the memory, and byte offset in it


class SharedMemory:
    """Zeroed memory that is shared by passing this object to a process at its start.

    On a CPU it is an anonymous file (memfd): a killed run leaves no name behind, it does not use ``/dev/shm``, whose size
    containers limit, and pages take no memory until they are used. On a GPU it is one CUDA allocation, whose CUDA-IPC
    handle is sent by torch.multiprocessing and opened at the first use of ``tensor``: until then the receiver has not
    initialised CUDA and can still set the environment that CUDA reads.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._fd: int | None = None
        self._counters: list[tuple[bytes, int]] = []  # PyTorch's reference counters, one for each receiver
        if device.type == "cuda":
            tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        else:
            self._fd = os.memfd_create("splitwiser", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, nbytes)
            tensor = map_memory(nbytes, self._fd)
        self._open: Callable[[], Tensor] = lambda: tensor

    @cached_property
    def tensor(self) -> Tensor:
        """The whole memory as uint8."""
        return self._open()

    @property
    def fd(self) -> int:
        """File descriptor of a CPU's memory that is not closed, for a program that it is passed to by number."""
        assert self._fd is not None
        return self._fd

    def __reduce__(self) -> tuple[Callable[..., "SharedMemory"], tuple[object, ...]]:
        if self._fd is None:
            rebuild, arguments = reduce_tensor(self.tensor)
            if self.tensor.is_cuda and self.tensor.numel():  # PyTorch counts no references to empty tensors
                self._counters.append(arguments[_COUNTER_HANDLE : _COUNTER_OFFSET + 1])
            return _opened, (rebuild, arguments)
        return _received, (reduction.DupFd(self._fd), self.tensor.nbytes)

    @classmethod
    def of(cls, tensor: Tensor) -> "SharedMemory":
        """Return the memory of a contiguous CUDA ``tensor``."""
        flat = tensor.view(-1).view(torch.uint8)
        return _opened(lambda: flat, ())

    def forget_receivers(self) -> None:
        """Release the references of the receivers, which have ended. A killed process does not release its own, and PyTorch
        would keep GPU memory that it has sent for ever (torch/csrc/CudaIPCTypes.cpp, "limbo")."""
        for handle, offset in self._counters:
            torch.UntypedStorage._release_ipc_counter(handle, offset, device=self.tensor.device)
        self._counters.clear()

    def close(self) -> None:
        """Close the handle; the memory is freed when the last tensor over it is deleted in every process."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _SentFd(Protocol):
    """Interface of a received ``multiprocessing.reduction.DupFd``."""

    def detach(self) -> int: ...


def _opened(rebuild: Callable[..., Tensor], arguments: tuple[object, ...]) -> SharedMemory:
    shared = SharedMemory.__new__(SharedMemory)
    shared._fd = None
    shared._counters = []
    shared._open = partial(rebuild, *arguments)
    return shared


def _received(fd: "_SentFd", nbytes: int) -> SharedMemory:
    number = fd.detach()
    try:
        tensor = map_memory(nbytes, number)
    finally:
        os.close(number)
    return _opened(lambda: tensor, ())


class SharedModule:
    """A module whose weights and buffers are in shared memory.

    On a CPU, creating it gathers the tensors of ``module`` in one :class:`SharedMemory`; on a GPU they are shared where they
    are. Sent to another process, :meth:`open` gives the same module over the same memory there.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.memories: list[SharedMemory] = []
        if device.type == "cuda":
            places = self._share(module)
        else:
            places = {key: (0, offset) for key, offset in gather(module, self._allocate).items()}
        buffer = io.BytesIO()
        _Pickler(buffer, places).dump(module)
        self._skeleton = buffer.getvalue()

    def _share(self, module: nn.Module) -> dict[int, _Place]:
        """Share the tensors of a GPU's ``module`` and return their places, by ``id``."""
        tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
        for tensor in tensors.values():
            tensor.data = tensor.detach().contiguous()
            self.memories.append(SharedMemory.of(tensor.data))
        return {key: (number, 0) for number, key in enumerate(tensors)}

    def _allocate(self, nbytes: int) -> Tensor:
        self.memories.append(SharedMemory(nbytes, torch.device("cpu")))
        return self.memories[0].tensor

    def open(self) -> nn.Module:
        """Return the module over the shared memory."""
        module: nn.Module = _Unpickler(io.BytesIO(self._skeleton), self.memories).load()
        return module


class _Pickler(pickle.Pickler):
    """Pickles a module with each shared tensor replaced by its place."""

    def __init__(self, file: io.BytesIO, places: dict[int, _Place]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._places = places

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, Tensor) or id(value) not in self._places:
            return None
        return self._places[id(value)], tuple(value.shape), value.dtype, isinstance(value, nn.Parameter)


class _Unpickler(pickle.Unpickler):
    """Unpickles the output of :class:`_Pickler`; a tensor of several modules (tied weights) becomes one object again."""

    def __init__(self, file: io.BytesIO, memories: Sequence[SharedMemory]) -> None:
        super().__init__(file)
        self._memories = memories
        self._opened: dict[_Place, Tensor] = {}

    def persistent_load(self, reference: tuple[_Place, tuple[int, ...], torch.dtype, bool]) -> Tensor:
        place, shape, dtype, is_parameter = reference
        if place not in self._opened:
            number, offset = place
            tensor = view(self._memories[number].tensor, offset, torch.Size(shape), dtype)
            self._opened[place] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return self._opened[place]
