"""Mode ``mps``: checks whether MPS can run on a GPU, and sets the GPU's compute mode."""

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

SMI_S = 30.0  # nvidia-smi takes seconds if the driver is not loaded yet


@dataclass(frozen=True)
class Gpu:
    """The GPU of a run; ``uuids`` are those of the visible GPUs, in CUDA's order, up to and including its own."""

    uuids: tuple[str, ...]
    name: str
    capability: tuple[int, int]
    compute_mode: str


def gpu_index(device: str) -> int:
    """Return CUDA's index of the GPU ``auto``, ``cuda`` or ``cuda:N``. Raises :class:`InputError` for other devices."""
    named = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if not named:
        raise InputError(
            f"mode mps: needs an NVIDIA GPU, and device is '{device}'; give cuda or cuda:N, or use mode mp"
        )
    return int(named[1] or 0)


def find_problem(device: str) -> str | None:
    """Return why mode ``mps`` cannot run on ``device`` of this machine, on one line, or None if it can.

    Does not initialise CUDA in this process. Raises :class:`InputError` for a device that is not a GPU.
    """
    found = inspect_gpu(gpu_index(device))
    return found if isinstance(found, str) else None


def inspect_gpu(device_index: int) -> Gpu | str:
    """Return the GPU with the properties that MPS depends on, or why mode ``mps`` cannot run on it."""
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
    """Return why MPS cannot run on this machine, whatever its GPUs, or None."""
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
    """Return the GPUs that CUDA sees, or why CUDA cannot be used."""
    command = [sys.executable, str(Path(__file__).parents[1] / "machine" / "cuda_probe.py")]
    try:  # without any running daemon: it may renumber the devices, or belong to another user
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
    """Put the GPU ``uuid`` into compute mode EXCLUSIVE_PROCESS and note its present mode in ``directory``.

    Raises :class:`InputError` if nvidia-smi fails.
    """
    mode = _nvidia_smi("-i", uuid, "--query-gpu=compute_mode", "--format=csv,noheader").strip()
    if mode.upper() == "EXCLUSIVE_PROCESS":
        return
    note = directory / "compute_mode"  # written first: if this run is killed, the next start restores the mode
    note.write_text(f"{uuid} {mode.upper()}", encoding="ascii")
    try:
        _nvidia_smi("-i", uuid, "-c", "EXCLUSIVE_PROCESS")
    except InputError:
        note.unlink()
        raise


def restore_compute_mode(directory: Path) -> None:
    """Restore the compute mode that is noted in ``directory``, if any. Raises :class:`InputError` if nvidia-smi fails."""
    note = directory / "compute_mode"
    if note.exists():
        uuid, mode = note.read_text(encoding="ascii").split()
        _nvidia_smi("-i", uuid, "-c", mode)
        note.unlink()


def _nvidia_smi(*arguments: str) -> str:
    """Run nvidia-smi, which can change the compute mode: NVML's call for that has not been tried on a GPU by an
    administrator. Returns its output; raises :class:`InputError`, as for option ``exclusive``."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            timeout=SMI_S,
            start_new_session=True,
            check=False,
        )
        reason = " ".join((done.stdout + done.stderr).split())
        if not done.returncode:
            return done.stdout
    except (OSError, subprocess.SubprocessError) as error:
        reason = first_line(error)
    raise InputError(
        f"--exclusive: 'nvidia-smi {' '.join(arguments)}' failed ({reason}); changing the compute mode needs root"
    )
