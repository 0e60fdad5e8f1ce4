"""The Triton decode attention against float64; how it cuts a context into parts changes nothing.

Without a GPU, Triton's interpreter computes it and its compiler compiles it; with one, it runs.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitwiser import constants
from splitwiser.model.kernels import gpu_attention as gpu_kernel
from splitwiser.model.kernels.gpu_attention import GpuDecodeAttention, load_gpu_kernels
from splitwiser.model.kernels.interface import PoolKernels
from tests.support.decode_cases import CASES, error_beyond_32_bits, largest_error

BOUNDS = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # by compute capability: what a program may have

Launch = tuple[tuple[Any, ...], dict[str, Any]]


def test_without_triton_plain_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    kernels, described = load_gpu_kernels(torch.float32, [])
    assert kernels == PoolKernels()
    assert described["decode_attention"] == "plain PyTorch (Triton is not installed)"


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"TRITON_CACHE_DIR": "/scratch/kernels", "TRITON_HOME": "/scratch"}, "/scratch/kernels"),
        ({"TRITON_HOME": "/scratch"}, "/scratch/.triton/cache"),
        ({"HOME": "/home/me"}, "/home/me/.triton/cache"),
    ],
)
def test_compiled_kernels_are_kept_where_triton_keeps_them(
    environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert gpu_kernel.cache_directory() == Path(folder)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder_it_is_said_how_to_name_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FileNotFoundError, match="there is no home folder to keep it; set TRITON_CACHE_DIR"):
        gpu_kernel.cache_directory()


@pytest.mark.slow
def test_kernels_are_offered_without_importing_triton() -> None:
    code = (
        "import sys, torch; from splitwiser.model.kernels.gpu_attention import load_gpu_kernels; "
        "load_gpu_kernels(torch.float32, []); "
        "sys.exit('triton' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(constants.DIR_PROJECT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize(
    ("programs", "parts"), [(1, 64), (4, 64), (8, 32), (16, 16), (30, 8), (132, 2), (133, 1), (512, 1)]
)
def test_parts_fill_the_device_and_no_more(programs: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernel, "_multiprocessors", lambda _: 132)
    assert gpu_kernel._parts(programs, torch.device("cpu")) == parts


# In Triton's interpreter, on the CPU


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    """The largest error of each case; the interpreter must be chosen before Triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    program = Path(__file__).parents[2] / "support" / "decode_cases.py"
    environment = {**os.environ, "PYTHONPATH": str(constants.DIR_PROJECT / "src"), "TRITON_INTERPRET": "1"}
    ended = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    errors: dict[str, float] = json.loads(ended.stdout)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_interpreted_attends_as_in_float64(name: str, interpreted: dict[str, float]) -> None:
    assert interpreted[name] <= BOUNDS[CASES[name].dtype]


@pytest.mark.slow
def test_interpreted_reads_a_pool_of_more_elements_than_32_bits_count(interpreted: dict[str, float]) -> None:
    assert interpreted["beyond 32 bits"] == 0


# Compiled for GPUs that need not be here


@dataclasses.dataclass
class Recorder:
    """In a Triton function's place: keeps what it is launched with."""

    launches: list[Launch] = dataclasses.field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        return self

    def __call__(self, *arguments: Any, **compiled_with: Any) -> None:
        self.launches.append((arguments, compiled_with))


def launches_of(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype,
    parts: int, options: bool, tables: Tensor | None = None,
) -> list[list[Launch]]:  # fmt: skip
    """What the wrapper launches ``attend_part`` and ``join_parts`` with, with soft-cap, sinks and a bias if ``options``."""
    recorders = Recorder(), Recorder()
    monkeypatch.setattr(gpu_kernel, "_kernels", lambda: recorders)
    monkeypatch.setattr(gpu_kernel, "_parts", lambda *_: parts)
    rows = torch.zeros(2, dtype=torch.int64)
    keys, values = (torch.zeros(4, 16, kv_heads, size, dtype=dtype) for size in (key_dim, value_dim))
    GpuDecodeAttention()(
        torch.zeros(2, heads, key_dim, dtype=dtype), keys, values,
        torch.zeros(2, 16, dtype=torch.int32) if tables is None else tables, rows, rows, rows, 0.3,
        *((5.0, torch.zeros(heads, dtype=dtype), torch.zeros(heads, 2048)) if options else ()),
    )  # fmt: skip
    return [recorder.launches for recorder in recorders]


def bound(function: Any, launch: Launch, capability: int) -> tuple[Any, Any, Any, Any, Any]:
    """Triton's target, and what it would compile ``function`` for in this launch: its launch options, the types of its
    arguments, its constants and what else it takes for granted."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    arguments, compiled_with = launch
    binder = create_function_from_signature(function.signature, function.params, backend)
    settings = {**compiled_with, "debug": False}
    options, signature, constexprs, attributes = function._pack_args(backend, settings, *binder(*arguments, **settings))
    return target, options, signature, constexprs, attributes


def usage(function: Any, launch: Launch, capability: int, folder: Path) -> tuple[int, int]:
    """Bytes that a thread spills, and bytes of shared memory of a program."""
    import triton
    from triton.compiler import ASTSource

    target, options, signature, constexprs, attributes = bound(function, launch, capability)
    source = ASTSource(function, signature, constexprs, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    listed = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary], check=True, capture_output=True, text=True
    ).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", listed))), compiled.metadata.shared


HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim", "dtype", "parts", "options"),
    [
        (32, 8, 64, 64, BF16, 32, False),  # Llama 3.2 1B
        (12, 12, 64, 64, FULL, 16, False),  # OPT-125m
        (8, 4, 256, 256, HALF, 1, True),  # Gemma 2 2B
        (8, 4, 256, 256, FULL, 1, True),
        (32, 8, 128, 128, FULL, 16, True),
        (71, 1, 64, 64, FULL, 64, True),  # Falcon 7B
        (128, 1, 256, 256, BF16, 64, True),
    ],
)
def test_compiled_fits_registers_and_shared_memory(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, parts: int, options: bool,
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("triton", reason="Triton is not installed")
    functions = gpu_kernel._kernels()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    made = launches_of(monkeypatch, heads, kv_heads, key_dim, value_dim, dtype, parts, options)
    assert [len(launches) for launches in made] == [1, int(parts > 1)]
    for function, launches in zip(functions, made, strict=True):
        for launch in launches:
            spilled, shared = usage(function, launch, capability, tmp_path)
            assert spilled == 0, function
            assert shared <= SHARED_BYTES[capability], function


@pytest.mark.parametrize("width", [1, 17, 4096])
def test_no_width_of_the_tables_is_compiled_for(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    attend_part, _ = gpu_kernel._kernels()
    launched = functools.partial(launches_of, monkeypatch, 4, 2, 64, 64, HALF, 2, True)
    other = torch.zeros(2 * width + 1, dtype=torch.int32)[1:].view(2, width)  # at an address of its own, too
    ((first,), _), ((second,), _) = launched(), launched(other)
    assert bound(attend_part, first, 90) == bound(attend_part, second, 90)


# On a GPU, which alone multiplies bfloat16 as it does


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own type", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_attends_as_in_float64(name: str, dtype: torch.dtype | None) -> None:
    case = dataclasses.replace(CASES[name], dtype=dtype or CASES[name].dtype)
    assert largest_error(case, torch.device("cuda")) <= BOUNDS[case.dtype]


@pytest.mark.gpu
def test_reads_a_pool_of_more_elements_than_32_bits_count() -> None:
    assert error_beyond_32_bits(torch.device("cuda")) == 0
