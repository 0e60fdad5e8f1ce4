"""The compiled decode attention for CPUs: built once with the machine's own C++ compiler, cached, and done without where
there is none."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from splitwiser.errors import first_line

SOURCE = Path(__file__).with_name("kernels") / "decode_attention.cpp"
FLAGS = ("-O3", "-march=native", "-funroll-loops", "-std=c++17", "-fopenmp", "-fPIC")
COMPILE_S = 120  # a second is usual

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CpuKernel:
    """The function of ``kernels/decode_attention.cpp``, called through ctypes; a
    :class:`~splitwiser.decode_kernel.DecodeKernel`."""

    def __init__(self, library: Path) -> None:
        self._function = ctypes.CDLL(str(library)).decode_attention
        pointers, sizes, factors = [ctypes.c_void_p] * 8, [ctypes.c_int64] * 7, [ctypes.c_float] * 2
        self._function.argtypes = [ctypes.c_int64, *pointers, *sizes, *factors, ctypes.c_int64]
        self._function.restype = None

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        starts: Tensor,
        lengths: Tensor,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`splitwiser.decode_kernel.DecodeKernel.__call__`."""
        query = query.contiguous()
        requests, heads, key_dim = query.shape
        _, block_tokens, kv_heads, value_dim = values.shape
        output = query.new_empty(requests, heads, value_dim)
        sinks = None if sinks is None else sinks.float().contiguous()
        self._function(
            _DTYPES[query.dtype], query.data_ptr(), keys.data_ptr(), values.data_ptr(), tables.data_ptr(),
            starts.data_ptr(), lengths.data_ptr(), None if sinks is None else sinks.data_ptr(), output.data_ptr(),
            requests, heads, kv_heads, key_dim, value_dim, block_tokens, tables.shape[1], scaling, softcap or 0.0,
            torch.get_num_threads(),
        )  # fmt: skip
        return output


def load_cpu_kernel() -> tuple[CpuKernel | None, str]:
    """The kernel and a line for the run's record; None, and the reason, where it cannot be had."""
    compiler = shutil.which("g++")  # another compiler's OpenMP is not the one that PyTorch has loaded
    if compiler is None:
        return None, "plain PyTorch (no g++ on PATH)"
    try:
        kernel = CpuKernel(_build(compiler))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
        return None, f"plain PyTorch (g++ failed: {lines[0]})"
    except subprocess.TimeoutExpired:
        return None, f"plain PyTorch (g++ took more than {COMPILE_S} s)"
    except OSError as error:
        return None, f"plain PyTorch (the compiled kernel cannot be used: {first_line(error)})"
    return kernel, f"{SOURCE.name}, compiled by {compiler}"


def cache_directory() -> Path:
    """Where the compiled kernel is kept: ``$XDG_CACHE_HOME/splitwiser`` or ``~/.cache/splitwiser``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "splitwiser"


def _build(compiler: str) -> Path:
    """The shared library, compiled unless the cache has it for this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_S).stdout
    identity = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), *map(str.encode, FLAGS), version, processor_flags()]))
    library = cache_directory() / f"decode_attention-{identity.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / "kernel"
        # linked without an OpenMP library: its calls find the one that PyTorch has loaded, and so its threads
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", f"{built}.o"],
            [compiler, "-shared", f"{built}.o", "-o", f"{built}.so"],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_S)
        Path(f"{built}.so").replace(library)  # whole or not at all, should two runs build at once
    return library


def processor_flags() -> bytes:
    """What the processor can do, as /proc/cpuinfo lists it."""
    for line in Path("/proc/cpuinfo").read_bytes().splitlines():
        if line.startswith((b"flags", b"Features")):
            return line
    return b""
