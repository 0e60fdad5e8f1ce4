"""What mode ``mps`` asks of the GPU, with a stand-in for the CUDA driver."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from splitwiser import LLM
from splitwiser.placement import mps_gpu
from tests.support.assertions import refusal


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is an NVIDIA GPU")
def test_without_a_gpu_the_mode_refuses_and_names_the_other(tiny: Callable[[str], Path]) -> None:
    problem = mps_gpu.find_problem("cuda:0")
    assert problem is not None
    assert problem.startswith("there is no NVIDIA GPU here")
    assert refusal(LLM, tiny("opt"), mode="mps") == f"mode mps: {problem}; use mode mp"


LIBCUDA = """
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 3; return 0; }
int cuDeviceGet(int *device, int index) { *device = 10 + index; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 12 ? "NVIDIA A100 MIG 1g.5gb" : device == 11 ? "Tesla P100" : "Tesla V100", length);
    return 0;
}
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, device, 16); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int old = device == 11;
    if (attribute == 75) *value = old ? 6 : 7;
    else if (attribute == 76) *value = 0;
    else if (attribute == 20) *value = device == 10 ? 3 : 0;
    else return 1;
    return 0;
}
int cuGetErrorString(int code, const char **said) { *said = "invalid argument"; return 0; }
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the CUDA driver, with three GPUs."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    (tmp_path / "libcuda.c").write_text(LIBCUDA)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "libcuda.c"], check=True, timeout=60
    )
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(mps_gpu, "_machine_problem", lambda: None)
    return tmp_path


@pytest.mark.usefixtures("driver")
def test_a_gpu_is_what_the_driver_says_it_is() -> None:
    first, third = "GPU-0a0a0a0a-0a0a-0a0a-0a0a-0a0a0a0a0a0a", "MIG-0c0c0c0c-0c0c-0c0c-0c0c-0c0c0c0c0c0c"
    assert mps_gpu.inspect_gpu(0) == mps_gpu.Gpu((first,), "Tesla V100", (7, 0), "EXCLUSIVE_PROCESS")
    found = mps_gpu.inspect_gpu(2)
    assert isinstance(found, mps_gpu.Gpu)
    assert (found.uuids[0], found.uuids[2], found.compute_mode) == (first, third, "DEFAULT")


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (0, None),
        (1, "Tesla P100 has compute capability 6.0, and MPS shares need 7.0 (Volta)"),
        (3, "there is no GPU 3: CUDA sees 3, numbered from 0"),
    ],
)
def test_a_problem_is_named(index: int, problem: str | None) -> None:
    assert mps_gpu.find_problem(f"cuda:{index}") == problem


def test_a_driver_that_fails_is_named(driver: Path) -> None:
    (driver / "libcuda.so.1").write_text("not a library")
    assert mps_gpu.find_problem("cuda:0") == "CUDA cannot be used: the driver's libcuda.so.1 cannot be loaded"


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:2", 2)])
def test_a_device_names_a_gpu(device: str, index: int) -> None:
    assert mps_gpu.gpu_index(device) == index
