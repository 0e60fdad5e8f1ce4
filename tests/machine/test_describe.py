"""What a run's record says of the machine, the versions and the commit."""

import importlib.metadata
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from splitwiser import __version__, constants
from splitwiser.machine import describe as machine

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def test_cpu_is_described_without_a_gpu() -> None:
    keys = ["processor", "generation", "instructions", "cores", "memory_gib", "system", "torch_threads"]
    assert list(machine.describe_machine(CPU)) == keys


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["vendor_id\t: AMD", "model name\t: AMD EPYC 9B14: 96 cores", "flags\t\t: fpu"], "AMD EPYC 9B14: 96 cores"),
        (["processor\t: 0", "BogoMIPS\t: 50.00"], platform.machine()),  # as Arm's kernels say it
    ],
)
def test_processor_is_named_as_the_system_names_it(
    lines: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("\n".join(lines))
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    assert machine._processor() == name


AMD, INTEL = "vendor_id\t: AuthenticAMD", "vendor_id\t: GenuineIntel"
AVX512, AMX = "flags\t\t: fpu avx2 avx512bw avx512_bf16", "flags\t\t: avx2 avx512bw avx512_bf16 amx_bf16"


def of_family(family: int, model: int) -> list[str]:
    """What /proc/cpuinfo says of a processor's family and model."""
    return [f"cpu family\t: {family}", f"model\t\t: {model}"]


@pytest.mark.parametrize(
    ("lines", "generation", "kind"),
    [
        ([AMD, *of_family(25, 17), AVX512], "Zen 4", "amd-zen4-avx512-bf16"),
        ([AMD, *of_family(26, 2), AVX512], "Zen 5", "amd-zen5-avx512-bf16"),
        ([AMD, *of_family(26, 36), AVX512], "family 26 model 36", "amd-family26model36-avx512-bf16"),
        ([INTEL, *of_family(6, 143), AMX], "Sapphire Rapids", "intel-sapphirerapids-amx"),
        ([INTEL, *of_family(6, 25), "flags\t\t: fpu avx2"], "family 6 model 25", "intel-family6model25-avx2"),
        (["processor\t: 0", "Features\t: asimd"], None, f"{platform.machine()}-plain"),
    ],
)
def test_kinds_of_processors_differ_by_vendor_generation_instructions_and_cores(
    lines: list[str], generation: str | None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("\n".join(lines) + "\n\nvendor_id\t: the second processor\n")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 6})
    assert machine.describe_machine(CPU)["generation"] == generation
    assert machine.kind_of_cpu() == f"cpu-{kind}-3-cores"


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 6})
    assert machine.describe_machine(CPU)["cores"] == 3


def test_memory_is_that_of_the_machine() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert machine.describe_machine(CPU)["memory_gib"] == pytest.approx(
        int(total.split()[1]) / 2**20, rel=0.02, abs=0.1
    )


def test_gpu_is_described_where_it_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="a GPU", total_memory=80 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    described = machine.describe_machine(CUDA)
    assert {key: described[key] for key in described if key.startswith("gpu")} == {
        "gpu": "a GPU", "gpu_memory_gib": 80.0, "gpu_sms": 132,
    }  # fmt: skip


@pytest.mark.parametrize(("gpu", "name"), [("NVIDIA H200", "cuda:0"), ("NVIDIA H200 (stand-in)", "cuda:0 (stand-in)")])
def test_a_stand_in_is_named_as_one(gpu: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name=gpu))
    assert machine.name_device(CUDA) == name


def test_versions_name_what_a_result_depends_on() -> None:
    assert set(machine.describe_versions()) == {
        "splitwiser", "python", "cuda", "torch", "transformers", "accelerate", "tokenizers", "numpy", "pandas",
        "datasets",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("splitwiser", __version__),
        ("python", platform.python_version()),
        ("numpy", np.__version__),
        ("torch", torch.__version__),
    ],
)
def test_version_is_the_one_that_runs(package: str, version: str) -> None:
    assert machine.describe_versions()[package] == version


def test_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "datasets":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = machine.describe_versions()
    assert (versions["datasets"], versions["accelerate"]) == (None, "1.0")


def test_commit_is_what_git_says_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.extend(command)
        return subprocess.CompletedProcess(command, 0, stdout="0123abcd-dirty\n")

    monkeypatch.setattr(subprocess, "run", answer)
    assert machine.git_commit() == "0123abcd-dirty"
    assert asked[:3] == ["git", "-C", str(constants.DIR_PROJECT)]


def test_a_package_within_another_projects_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "-m", "another's"]
    subprocess.run(["git", "-C", tmp_path, *commit], check=True)
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(constants, "DIR_PROJECT", tmp_path / "shipped")
    assert machine.git_commit() is None
    monkeypatch.setattr(constants, "DIR_PROJECT", tmp_path)
    assert len(str(machine.git_commit())) == 40


def test_commit_of_a_copy_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITWISER_COMMIT", "4567")
    assert machine.git_commit() == "4567"


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git"), subprocess.TimeoutExpired("git", 10)],
    ids=["no git", "no checkout", "too slow"],
)
def test_no_commit_where_git_has_no_answer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert machine.git_commit() is None


def resident_mb(field: str) -> float:
    """What the kernel says of this process: VmRSS is held now, VmHWM was the most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6


def test_peak_memory_is_the_most_so_far() -> None:
    assert machine.peak_memory_mb(CPU) == pytest.approx(resident_mb("VmHWM"), rel=0.05)


def test_peak_memory_keeps_what_was_given_back() -> None:
    before = machine.peak_memory_mb(CPU)
    size = int((resident_mb("VmHWM") - resident_mb("VmRSS") + 100) * 1e6)
    with mmap.mmap(-1, size) as block:  # memory of the allocator may be in this process already, and be reused
        block.write(b"1" * size)
    assert machine.peak_memory_mb(CPU) >= before + 80


def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    script = (
        "import sys, types\n"
        "sys.modules['torch'] = types.SimpleNamespace(device=object)  # a small process: its parent has the real one\n"
        "from splitwiser.machine.describe import peak_memory_mb\n"
        "print(peak_memory_mb(types.SimpleNamespace(type='cpu')))\n"
    )
    path = os.pathsep.join(sys.path)
    made = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert float(made.stdout) < 100


def test_memory_of_a_gpu_is_what_is_in_use_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4_500_000, 10_000_000))
    assert machine.peak_memory_mb(CUDA) == 5.5


def test_the_peak_can_be_counted_anew() -> None:
    device = torch.device("cpu")
    with mmap.mmap(-1, 64_000_000) as memory:  # not the C library's, which may keep what it is given back
        memory.write(bytes(64_000_000))
    before = machine.peak_memory_mb(device)
    machine.reset_peak_memory(device)
    assert machine.peak_memory_mb(device) < before - 30
