"""What mode ``mps`` asks of the GPU, with a stand-in for the CUDA driver."""

from collections.abc import Callable
from pathlib import Path

import pytest

from splitwiser import LLM
from splitwiser.placement import mps_gpu
from tests.support.assertions import refusal
from tests.support.cuda_driver import put_cuda_driver


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is an NVIDIA GPU")
def test_without_a_gpu_the_mode_refuses_and_names_the_other(tiny: Callable[[str], Path]) -> None:
    problem = mps_gpu.find_problem("cuda:0")
    assert problem is not None
    assert problem.startswith("there is no NVIDIA GPU here")
    assert refusal(LLM, tiny("opt"), mode="mps") == f"mode mps: {problem}; use mode mp"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the CUDA driver, with three GPUs."""
    put_cuda_driver(tmp_path)
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
