"""Description of the machine, the package versions and the commit, for a run's record; and peak memory."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil
import torch

from splitwiser import constants
from splitwiser.machine.stand_in import STAND_IN, is_stand_in
from splitwiser.version import __version__

PACKAGES = ("transformers", "accelerate", "tokenizers", "numpy", "pandas", "datasets")
VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
# what the kernels for CPUs tell apart: the first of which /proc/cpuinfo lists the flag
INSTRUCTION_SETS = {"amx": "amx_bf16", "avx512-bf16": "avx512_bf16", "avx512": "avx512bw", "avx2": "avx2"}
# by vendor, family and models, as in Linux's arch/x86/kernel/cpu/amd.c and arch/x86/include/asm/intel-family.h
GENERATIONS = (
    ("amd", 25, (*range(0x10, 0x20), *range(0x60, 0xB0)), "Zen 4"),
    # not the mobile ones of Zen 5, whose vector units have half the width
    ("amd", 26, (*range(0x00, 0x20), *range(0x40, 0x50)), "Zen 5"),
    ("intel", 6, (0x8F,), "Sapphire Rapids"),
    ("intel", 6, (0xCF,), "Emerald Rapids"),
    ("intel", 6, (0xAD, 0xAE), "Granite Rapids"),
)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return processor, cores that this process may use, memory, system and, if ``device`` is a GPU, its properties.

    ``generation`` is that of the processor, its family and model where the generation is not known, and None where the
    system does not say; ``instructions`` are the instruction set of :func:`kind_of_cpu`.
    """
    described: dict[str, Any] = {
        "processor": _processor(),
        "generation": _generation(),
        "instructions": _instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "torch_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_sms": properties.multi_processor_count,
        }
    return described


def kind_of_cpu() -> str:
    """Return the kind of processor and the cores that this process may use, such as
    ``cpu-amd-zen5-avx512-bf16-2-cores``: what results on a CPU depend on most. Instead of a generation that is not known it
    has family and model, such as ``family6model85``, and without an instruction set that the kernels know ``plain``."""
    generation = re.sub(r"\W", "", (_generation() or "").lower())
    cores = len(os.sched_getaffinity(0))
    return "-".join(filter(None, ("cpu", _vendor(), generation, _instructions(), f"{cores}-cores")))


def name_device(device: torch.device) -> str:
    """Return the name of ``device`` in tables, such as ``cuda:0``; a stand-in for a GPU is marked as one."""
    if device.type == "cuda" and is_stand_in(torch.cuda.get_device_properties(device).name):
        return f"{device} ({STAND_IN})"
    return str(device)


def describe_versions() -> dict[str, str | None]:
    """Return the versions of Splitwiser, Python, CUDA and the packages that results depend on; None for one that is not
    installed."""
    versions: dict[str, str | None] = {
        "splitwiser": __version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    versions["torch"] = str(torch.__version__)  # includes the build, such as +cpu
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def git_commit() -> str | None:
    """Return the project's commit, with ``-dirty`` if tracked files differ from it; None outside a git checkout. The
    environment variable ``SPLITWISER_COMMIT``, if set, is returned instead, for copies without git."""
    if given := os.environ.get("SPLITWISER_COMMIT"):
        return given
    if not (constants.DIR_PROJECT / ".git").exists():  # an installed package may lie within another project's checkout
        return None
    command = ["git", "-C", str(constants.DIR_PROJECT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def peak_memory_mb(device: torch.device, workers: Collection[int] = ()) -> float:
    """Return the peak memory of a run so far, in MB (10^6 bytes).

    On a GPU: all memory in use there now, including the contexts of processes. Shared memory counts once, and since
    PyTorch keeps what it has allocated, this is the peak if nobody else uses the GPU. On a CPU: the peak resident set of
    this process or, with ``workers`` (process ids), the sum of the present proportional set sizes of this process and
    them, in which shared memory counts once, as it would not in a sum of peaks.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 1e6
    if workers:
        return sum(map(_proportional_bytes, [os.getpid(), *workers])) / 1e6
    # not ru_maxrss, which includes the peak of the process that started this one
    return _peak_kib() * 1024 / 1e6


def reset_peak_memory(device: torch.device) -> None:
    """Make :func:`peak_memory_mb` count from now on, if the system allows it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # PyTorch keeps what it has allocated; see peak_memory_mb
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the peak resident set


def _proportional_bytes(pid: int) -> int:
    """Return the proportional set size of process ``pid``; 0 if it has ended."""
    try:
        nbytes: int = psutil.Process(pid).memory_full_info().pss
    except psutil.Error:
        return 0
    return nbytes


def _peak_kib() -> int:
    """Return the peak resident set of this process in KiB, from proc_pid_status(5); psutil does not have it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def _processor() -> str:
    return _cpuinfo().get("model name") or platform.machine()


def _vendor() -> str:
    return VENDORS.get(_cpuinfo().get("vendor_id", ""), platform.machine())


def _generation() -> str | None:
    """Return the generation of the processor, or its family and model; None where the system does not say."""
    lines = _cpuinfo()
    if "cpu family" not in lines:
        return None
    vendor, family, model = _vendor(), int(lines["cpu family"]), int(lines["model"])
    known = (name for of, number, models, name in GENERATIONS if (of, number) == (vendor, family) and model in models)
    return next(known, f"family {family} model {model}")


def _instructions() -> str:
    flags = _cpuinfo().get("flags", "").split()
    return next((name for name, flag in INSTRUCTION_SETS.items() if flag in flags), "plain")


def _cpuinfo() -> dict[str, str]:
    """Return what /proc/cpuinfo says of the first processor."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
