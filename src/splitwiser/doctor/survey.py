"""What this machine has, one check a function; each returns whether it is in order, a text and figures.

A check raises whatever breaks it. PyTorch is imported where a check needs it, so that the others work where it is broken.
"""

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import psutil

from splitwiser import constants
from splitwiser.doctor.probe import ProbeError, ask, ask_ahead, run_command
from splitwiser.errors import first_line
from splitwiser.machine import cgroup
from splitwiser.machine import load as machine_load
from splitwiser.model.catalog import resolve_model

DEVICES_S, SHARE_S, HUB_S, TOOL_S = 60.0, 90.0, 20.0, 10.0  # longest that each question may take
FEW_FILES = 256  # a run opens some tens of files, and a pipe for every pair of processes
IPC_COUNTERS = 10_000 * 8  # bytes of /dev/shm that PyTorch's CUDA IPC takes (torch/csrc/CudaIPCTypes.h)
# what the decode kernel and PyTorch's products are fast with, as x86 and Arm processors name it
PROCESSOR_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")

Found = tuple[bool | None, str, dict[str, Any]]
"""``ok`` (False: missing or in the way; None: does not apply or was not tried), the text, and figures for machines."""


def format_size(nbytes: int) -> str:
    """``nbytes`` in MiB or GiB."""
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.1f} MiB"


# software


def find_pytorch() -> Found:
    """Whether PyTorch can be imported, and which."""
    try:
        import torch
    except Exception as error:
        return False, f"cannot be imported ({type(error).__name__}: {first_line(error)})", {}
    cuda = torch.version.cuda
    build = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    return True, f"{torch.__version__}, {build}", {"version": str(torch.__version__), "cuda": cuda}


def find_transformers() -> Found:
    """Whether transformers and accelerate can be imported, and which."""
    try:
        import accelerate
        import transformers
        from transformers import AutoModelForCausalLM  # noqa: F401  # what is imported lazily breaks only here
    except Exception as error:
        return False, f"cannot be imported ({type(error).__name__}: {first_line(error)})", {}
    versions = {"version": transformers.__version__, "accelerate": accelerate.__version__}
    return True, f"{transformers.__version__}, accelerate {accelerate.__version__}", versions


# the GPU


def ask_for_gpus_ahead() -> None:
    """Begin to look for GPUs, if this PyTorch can have any."""
    import torch

    if torch.version.cuda is not None:
        ask_ahead("devices", deadline_s=DEVICES_S)


def ask_for_sharing_ahead(place: str) -> None:
    """Begin to try whether processes can share memory, on the CPU and on ``place``."""
    for device in {"cpu", place}:
        ask_ahead("shares", device, deadline_s=SHARE_S)


def find_gpus() -> Found:
    """The GPUs that PyTorch finds; ``devices`` as the probe of that name tells them."""
    import torch

    if torch.version.cuda is None:
        return None, "none can be used: this PyTorch is built without CUDA", {"devices": []}
    answer = ask("devices", deadline_s=DEVICES_S)
    described = [
        f"cuda:{each['index']} {each['name']}, compute capability {each['compute_capability']}, {each['sms']} SMs, "
        f"{format_size(each['free_bytes'])} of {format_size(each['total_bytes'])} free"
        for each in answer["devices"]
    ]
    return bool(described), "; ".join(described) or f"none: {answer['problem']}", {"devices": answer["devices"]}


def find_device(device: str, gpus: int) -> Found:
    """The device that ``device`` means where there are ``gpus`` GPUs."""
    from splitwiser.machine.device import resolve_device

    place = str(resolve_device(device, gpus))
    return True, f"{place} ({'as asked for' if device != 'auto' else 'chosen by auto'})", {"device": place}


def find_nvidia_smi() -> Found:
    """Driver, compute mode and MIG, as the driver's own tool tells them."""
    if shutil.which("nvidia-smi") is None:
        return None, "not on PATH", {}
    names = ("index", "driver_version", "compute_mode", "mig.mode.current")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    rows = [dict(zip(names, line.split(", "), strict=True)) for line in run_command(command, TOOL_S).splitlines()]
    texts = []
    for row in rows:
        text = f"GPU {row['index']}: driver {row['driver_version']}, compute mode {row['compute_mode']}"
        text += f", MIG {row['mig.mode.current']}" if row["mig.mode.current"] in ("Enabled", "Disabled") else ""
        if row["compute_mode"] == "Exclusive_Process":
            text += " (one process at a time, so mode mp needs MPS)"
        texts.append(text)
    usable = all(row["compute_mode"] == "Default" for row in rows)
    return usable, "; ".join(texts), {"gpus": rows}


def find_cuda_ipc(place: str | None) -> Found:
    """Whether two processes can share memory of the GPU ``place``, by doing it."""
    if place is None:
        return None, "no GPU to share memory on", {}
    ask("shares", place, deadline_s=SHARE_S)
    return True, "a tensor sent to a second process was written there and read back", {}


def find_green_contexts(on_gpu: bool, problem: str | None) -> Found:
    """Whether green contexts can be made; ``problem`` is why not."""
    if not on_gpu:
        return None, "no GPU to divide", {}
    return problem is None, problem or "can be made", {}


def find_mps_binary() -> Found:
    """The program that starts an MPS daemon."""
    from splitwiser.placement.mps_daemon import CONTROL

    path = shutil.which(CONTROL)
    return (True, path, {"path": path}) if path else (None, f"{CONTROL} is not on PATH", {"path": None})


def find_mps_daemon() -> Found:
    """The MPS daemon that a process of this environment would be a client of, and whose it is."""
    from splitwiser.placement.mps_daemon import running_daemon

    daemon = running_daemon()
    if daemon is None:
        return None, "none runs", {}
    figures = {"pid": daemon.pid, "user": daemon.user, "pipe_directory": str(daemon.pipe_directory)}
    return True, f"{daemon}", figures


# the processor


def find_processor() -> Found:
    """The processor and those of its instructions that matter here."""
    import torch

    from splitwiser.machine.describe import describe_machine
    from splitwiser.model.kernels.build import processor_flags

    name = describe_machine(torch.device("cpu"))["processor"]
    flags = set(processor_flags().decode().split())
    features = [feature for feature in PROCESSOR_FEATURES if feature in flags]
    return (
        True,
        f"{name}: {', '.join(features) or 'no vector extension known here'}",
        {"name": name, "features": features},
    )


def find_cores() -> Found:
    """Cores, what a container lets be used of them, and PyTorch's threads."""
    import torch

    cores, threads, quota = len(os.sched_getaffinity(0)), torch.get_num_threads(), cgroup.cpu_quota()
    figures = {"cores": cores, "quota": quota, "torch_threads": threads}
    text = f"{cores} that this process may use, {threads} PyTorch threads"
    if quota is not None and quota < cores:
        whole = max(1, int(quota))
        text += f", but the container may take the time of {quota:g}: start runs under taskset -c with {whole} of them"
        return False, text, figures
    return True, text, figures


def find_load() -> Found:
    """What others use of the cores right now."""
    load = machine_load.look()
    named = ("load_average", "others_cores", "cpu_pressure")
    figures = {name: load.record[name] for name in named}
    if load.others_cores is None:
        return None, "the system does not say what others use", figures
    text = f"others use {load.others_cores:.1f} of {load.cores:g} cores now, load average {load.load_average}"
    if load.crowded:
        return None, f"{text}: what is measured meanwhile is not this machine's own speed", figures
    return True, text, figures


def find_compiler() -> Found:
    """The compiler of the C++ functions."""
    path = shutil.which("g++")
    if path is None:
        return None, "no g++ on PATH", {"path": None}
    version = run_command([path, "--version"], TOOL_S).splitlines()[0]
    return True, f"{path}, {version}", {"path": path}


def find_kernel(place: str | None) -> Found:
    """Makes the kernel, as a run would, so that the answer is that of a run."""
    import torch

    from splitwiser.model.kernels import build as native
    from splitwiser.model.kernels import gpu_attention as gpu_kernel
    from splitwiser.model.kernels.choose import load_kernels

    kernels, described = load_kernels(constants.KERNELS, torch.device(place or "cpu"), torch.bfloat16, [])
    compiled, text = kernels.decode is not None, described["decode_attention"]
    cache, kept = None, ""
    try:
        cache = (native if place in (None, "cpu") else gpu_kernel).cache_directory()
        kept = f"kept in {cache}"
    except FileNotFoundError as error:
        kept = first_line(error)
    figures = {
        "kernel": text,
        "compiled": compiled,
        "cache": cache and str(cache),
        "cache_writable": cache is not None and _is_writable(cache),
        "openmp": torch.backends.openmp.is_available(),
    }
    if compiled:
        text += "" if kernels.prefill or kernels.varlen else f"; prefill: {described['prefill_attention']}"
        text += f"; {kept}"
    text += "" if figures["openmp"] else "; PyTorch was built without OpenMP"
    return (None if place != "cpu" else compiled), text, figures


def _is_writable(path: Path) -> bool:
    """Whether ``path`` can be written to, or made if it is not there."""
    there = next(each for each in [path, *path.parents] if each.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


# memory


def find_main_memory() -> Found:
    """Main memory that can be had, within what a container allows."""
    from splitwiser.machine.memory import available_memory

    memory = psutil.virtual_memory()
    room, free = cgroup.memory_room(), available_memory()
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    text = f"{format_size(memory.available)} of {format_size(memory.total)} available"
    if room is not None:
        text += f"; the container's limit leaves {format_size(room)}"
    if address_space != resource.RLIM_INFINITY:
        text += f"; ulimit -v allows {format_size(address_space)} of addresses, PyTorch's own included"
    return True, text, {"free_bytes": free, "total_bytes": memory.total, "container_room_bytes": room}


def find_shared_memory() -> Found:
    """Whether two processes can share main memory as the workers of mode mp do, by doing it."""
    from splitwiser.placement.checks import find_memfd_problem

    if problem := find_memfd_problem():
        return False, problem, {}
    ask("shares", "cpu", deadline_s=SHARE_S)
    return True, "an anonymous file sent to a second process was written there and read back", {}


def find_dev_shm(on_gpu: bool) -> Found:
    """Room in ``/dev/shm``, which containers keep small, against what a run lays there."""
    shm = os.statvfs("/dev/shm")
    size, free = shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize
    ok = not on_gpu or free >= IPC_COUNTERS
    text = f"{format_size(free)} of {format_size(size)} free; "
    if on_gpu:
        text += f"CUDA IPC needs {IPC_COUNTERS // 1000} kB of it, weights and pool none"
    else:
        text += "a run needs none of it: weights and pool lie in anonymous files, which are main memory"
    return ok, text, {"size_bytes": size, "free_bytes": free}


def find_open_files() -> Found:
    """How many files a process may open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY or limit >= FEW_FILES:
        return True, "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} allowed", {"limit": limit}
    return False, f"{limit} allowed, which many workers use up: ulimit -n {FEW_FILES} or more", {"limit": limit}


# the hub


def find_hub(model: str, wanted: bool) -> Found:
    """Where the hub's cache is and, if ``wanted``, whether the hub has ``model``; ``problem`` says why it cannot be had."""
    from huggingface_hub import constants as hub

    cache = f"cache {hub.HF_HUB_CACHE}"
    if not Path(hub.HF_HUB_CACHE).is_dir():
        cache += " (not there yet)"
    if not _is_writable(Path(hub.HF_HUB_CACHE)):
        cache += " (cannot be written)"
    setting = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else "HF_HUB_OFFLINE is not set"
    problem = setting if hub.HF_HUB_OFFLINE else None
    figures = {"problem": problem, "cache": hub.HF_HUB_CACHE, "tried": wanted}
    if not wanted:
        return None, f"not tried (--hub tries it); {setting}; {cache}", figures
    name = resolve_model(model).hub
    try:
        ask("hub", name, deadline_s=HUB_S)
    except ProbeError as error:
        return False, f"{hub.ENDPOINT}: {error}; {setting}; {cache}", {**figures, "problem": str(error)}
    return True, f"{name or 'the hub'} can be had from {hub.ENDPOINT}; {setting}; {cache}", figures
