"""What mode ``mps`` asks of the GPU: whether MPS can run on it, and its compute mode."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from splitwiser.errors import InputError, first_line
from splitwiser.machine.process import find_children_problem

CONTROL = "nvidia-cuda-mps-control"
PIPES = "CUDA_MPS_PIPE_DIRECTORY"

SMI_S = 30.0  # nvidia-smi takes seconds where the driver is not loaded yet


@dataclass(frozen=True)
class Gpu:
    """The GPU of a run: ``uuids`` are of the visible GPUs up to it, as CUDA numbers them, its own last."""

    uuids: tuple[str, ...]
    name: str
    capability: tuple[int, int]
    compute_mode: str


def gpu_index(device: str) -> int:
    """The GPU, as CUDA numbers them, that ``auto``, ``cuda`` or ``cuda:N`` names. Raises :class:`InputError` on others."""
    named = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if not named:
        raise InputError(
            f"mode mps: needs an NVIDIA GPU, and device is '{device}'; give cuda or cuda:N, or use mode mp"
        )
    return int(named[1] or 0)


def find_problem(device: str) -> str | None:
    """Return why mode ``mps`` cannot run on ``device`` of this machine, in one line; None if nothing speaks against it.
    Does not initialise CUDA in this process. Raises :class:`InputError` for a device that is no GPU."""
    found = inspect_gpu(gpu_index(device))
    return found if isinstance(found, str) else None


def inspect_gpu(device_index: int) -> Gpu | str:
    """The GPU with what MPS depends on, or why mode ``mps`` cannot run on it."""
    if problem := _machine_problem():
        return problem
    gpus = _probe()
    if isinstance(gpus, str):
        return f"CUDA cannot be used: {gpus}"
    if device_index >= len(gpus):
        return f"there is no GPU {device_index}: CUDA sees {len(gpus)}, numbered from 0"
    gpu = gpus[device_index]
    if gpu.capability < (7, 0):
        return f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, and MPS shares need 7.0 (Volta)"
    if gpu.compute_mode == "PROHIBITED":
        return f"{gpu.name} is in compute mode PROHIBITED (nvidia-smi -c DEFAULT, as root, changes it)"
    return gpu


def _machine_problem() -> str | None:
    if problem := find_children_problem():
        return problem
    if sys.platform != "linux":
        return f"NVIDIA MPS runs on Linux, and this is {platform.system()}"
    if "microsoft" in platform.release().lower():
        return "NVIDIA MPS runs on Linux itself, and this is Linux under Windows (WSL)"
    if Path("/etc/nv_tegra_release").exists():
        return "the workers share memory by CUDA IPC, which NVIDIA's MPS does not support on Tegra"
    if not Path("/dev/nvidiactl").exists():
        return "there is no NVIDIA GPU here (no /dev/nvidiactl)"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if shutil.which(CONTROL) is None:
        return f"{CONTROL} is not on PATH; it comes with the NVIDIA driver (on Ubuntu in nvidia-compute-utils)"
    return None


def _probe() -> list[Gpu] | str:
    """The GPUs that CUDA sees, or why it sees none."""
    command = [sys.executable, str(Path(__file__).parents[1] / "machine" / "cuda_probe.py")]
    try:  # without a daemon, even where one is there: it may count the devices anew, or be another user's
        done = subprocess.run(
            command, env={**os.environ, PIPES: os.devnull}, capture_output=True, text=True, timeout=SMI_S, check=True
        )
        answer = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return first_line(error)
    if "error" in answer:
        return str(answer["error"])
    uuids = [gpu["uuid"] for gpu in answer["gpus"]]
    return [
        Gpu(tuple(uuids[: index + 1]), gpu["name"], tuple(gpu["capability"]), gpu["compute_mode"])
        for index, gpu in enumerate(answer["gpus"])
    ]


def make_exclusive(uuid: str, directory: Path) -> None:
    found = _nvidia_smi("-i", uuid, "--query-gpu=compute_mode", "--format=csv,noheader").strip()
    if found.upper() == "EXCLUSIVE_PROCESS":
        return
    note = directory / "compute_mode"  # written first: should this run be killed, the next start puts the mode back
    note.write_text(f"{uuid} {found.upper()}", encoding="ascii")
    try:
        _nvidia_smi("-i", uuid, "-c", "EXCLUSIVE_PROCESS")
    except InputError:
        note.unlink()
        raise


def restore_compute_mode(directory: Path) -> None:
    note = directory / "compute_mode"
    if note.exists():
        uuid, mode = note.read_text(encoding="ascii").split()
        _nvidia_smi("-i", uuid, "-c", mode)
        note.unlink()


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            timeout=SMI_S,
            start_new_session=True,
            check=False,
        )
        said = " ".join((done.stdout + done.stderr).split())
        if not done.returncode:
            return done.stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = first_line(error)
    raise InputError(
        f"--exclusive: 'nvidia-smi {' '.join(arguments)}' failed ({said}); changing the compute mode needs root"
    )
