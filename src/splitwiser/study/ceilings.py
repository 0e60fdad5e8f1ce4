"""Measures the ceilings of this machine: the rates of a matrix product and of a pass over memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from splitwiser.machine.memory import available_memory
from splitwiser.machine.pages import use_pages
from splitwiser.model.kv_pool import zeroed_memory

_PRODUCT_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # the larger ones exceed the caches; the fastest counts
_PASS_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_REPEATS = {"compute": 5, "memory": 20}  # others use a machine's memory more than its arithmetic


@dataclass(frozen=True)
class CeilingProbe:
    """One measurement: the shortest time of a pass and its amount of work (bytes or operations)."""

    kind: str
    what: str
    size: int
    seconds: float
    amount: float

    def row(self) -> dict[str, object]:
        """Return its row of ``ceilings.csv``; rates in TFLOP/s or GB/s (10^12, 10^9)."""
        unit, scale = ("TFLOP/s", 1e12) if self.kind == "compute" else ("GB/s", 1e9)
        return {
            "kind": self.kind,
            "what": self.what,
            "size": self.size,
            "ms": self.seconds * 1e3,
            "amount": self.amount,
            "rate": self.amount / self.seconds / scale,
            "unit": unit,
        }


@dataclass(frozen=True)
class Ceilings:
    """Operations per second and bytes per second: the best of the probes of each kind."""

    flops_per_s: float
    bytes_per_s: float

    @property
    def ridge(self) -> float:
        """Operations per byte above which compute, not memory, is the limit."""
        return self.flops_per_s / self.bytes_per_s

    def attainable(self, intensity: float) -> float:
        """Return the operations per second that the roofline allows at ``intensity`` operations per byte (Williams et al.
        2009)."""
        return min(self.flops_per_s, intensity * self.bytes_per_s)


def measure_ceilings(dtype: torch.dtype, device: torch.device, *, int8: bool = False) -> list[CeilingProbe]:
    """Return probes in ``dtype`` on ``device`` with PyTorch's current thread count.

    Compute: ``linear`` of square matrices, as models call it, 2 n^3 operations; with ``int8`` also PyTorch's product of int8
    matrices. Memory: a copy, counted as bytes read plus bytes written, and a sum over float32, counted as bytes read (a CPU
    may fetch what a copy overwrites, which is not counted; then the sum is the faster pass). Buffers are larger than the
    caches, and lie in pages as weights do.
    """
    probes = []
    for size in _PRODUCT_SIZES[device.type]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        probes.append(_probe("compute", "matrix product", size, 2 * size**3, partial(linear, left, right), device))
        if int8:
            left, right = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
            product = partial(torch._int_mm, left, right.t())
            probes.append(_probe("compute", "product of int8 matrices", size, 2 * size**3, product, device))
    nbytes = min(_PASS_BYTES[device.type], available_memory() // 8)
    source, target = (_buffer(nbytes, device) for _ in range(2))
    probes.append(_probe("memory", "copy", source.nbytes, 2 * source.nbytes, partial(target.copy_, source), device))
    probes.append(_probe("memory", "sum", source.nbytes, source.nbytes, source.sum, device))
    return probes


def _buffer(nbytes: int, device: torch.device) -> Tensor:
    memory = zeroed_memory(nbytes // 4 * 4, device)
    if device.type == "cpu":
        use_pages(memory)
    return memory.view(torch.float32)


def ceilings_of(probes: list[CeilingProbe]) -> Ceilings:
    """Return the best rate of each kind."""

    def best(kind: str) -> float:
        return max(probe.amount / probe.seconds for probe in probes if probe.kind == kind)

    return Ceilings(best("compute"), best("memory"))


@torch.inference_mode()
def _probe(
    kind: str, what: str, size: int, amount: float, run: Callable[[], Tensor], device: torch.device
) -> CeilingProbe:
    """Return the shortest time of ``run`` after a warm-up; on a GPU measured by events."""
    times: list[float] = []
    for _ in range(_REPEATS[kind] + 1):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return CeilingProbe(kind, what, size, min(times[1:]), amount)
