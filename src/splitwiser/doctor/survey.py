"""Checks of this machine, one per function; each returns whether it passed, a text and figures.

A check may raise any exception. PyTorch is imported only where a check needs it, so that the others work where it is broken.
"""

import os
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from splitwiser import constants
from splitwiser.doctor.probe import ProbeError, ask, ask_ahead, run_command
from splitwiser.errors import InputError, first_line
from splitwiser.machine import cgroup
from splitwiser.machine import load as machine_load
from splitwiser.text import format_size

DEVICES_S, DRIVER_S, SHARE_S, HUB_S, TOOL_S = 60.0, 30.0, 90.0, 20.0, 10.0  # longest that each probe may take
FEW_FILES = 256  # a run opens tens of files, and a pipe for every pair of processes
IPC_COUNTERS = 10_000 * 8  # bytes of /dev/shm that PyTorch's CUDA IPC uses (torch/csrc/CudaIPCTypes.h)
# instruction sets that speed up the decode kernel and PyTorch's matrix products, as x86 and Arm processors name them
PROCESSOR_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")

Found = tuple[bool | None, str, dict[str, Any]]
"""``ok`` (False: missing, or prevents a run; None: does not apply or was not tried), a text, machine-readable figures."""


# software


def find_pytorch() -> Found:
    """Check whether PyTorch can be imported, and return its version."""
    try:
        import torch
    except Exception as error:
        return False, f"cannot be imported ({type(error).__name__}: {first_line(error)})", {}
    cuda = torch.version.cuda
    build = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    return True, f"{torch.__version__}, {build}", {"version": str(torch.__version__), "cuda": cuda}


def find_transformers() -> Found:
    """Check whether transformers and accelerate can be imported, and return their versions."""
    try:
        import accelerate
        import transformers
        from transformers import AutoModelForCausalLM  # noqa: F401  # lazily imported parts fail only here
    except Exception as error:
        return False, f"cannot be imported ({type(error).__name__}: {first_line(error)})", {}
    versions = {"version": transformers.__version__, "accelerate": accelerate.__version__}
    return True, f"{transformers.__version__}, accelerate {accelerate.__version__}", versions


def find_vllm(backend_python: str | None, place: str | None, refused: Mapping[str, str | None]) -> Found:
    """Check whether the back end vLLM has an environment that runs on ``place``, and return its version and the modes that
    it runs in there; ``refused`` says why a mode does not work here, None if it does. What is missing prevents no other
    run."""
    from splitwiser.placement.modes import BACKENDS
    from splitwiser.vllm_backend.environment import find_environment

    try:
        found = find_environment(backend_python)
    except InputError as error:
        return None, str(error), {}
    figures = {**found.versions, "python": str(found.python)}
    if place and (problem := found.find_problem(place.partition(":")[0])):
        return None, problem, figures
    modes = [mode for mode in BACKENDS["vllm"].modes if not refused.get(mode)]
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items() if name != "vllm")
    text = f"{found.versions['vllm']} ({versions}) at {found.python}: modes {', '.join(modes)}"
    return True, f"{text}; {found.note}" if found.note else text, {**figures, "modes": modes}


# the GPU


def ask_for_gpus_ahead() -> None:
    """Start the probe for GPUs, if this PyTorch supports any."""
    import torch

    if torch.version.cuda is not None:
        ask_ahead("devices", deadline_s=DEVICES_S)


def ask_for_sharing_ahead(place: str) -> None:
    """Start the probes for sharing memory between processes, on the CPU and on ``place``."""
    for device in {"cpu", place}:
        ask_ahead("shares", device, deadline_s=SHARE_S)


def find_gpus() -> Found:
    """Return the GPUs that PyTorch finds, from the probe ``devices``."""
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
    """Return the device that ``device`` refers to on a machine with ``gpus`` GPUs."""
    from splitwiser.machine.device import resolve_device

    place = str(resolve_device(device, gpus))
    return True, f"{place} ({'as requested' if device != 'auto' else 'chosen by auto'})", {"device": place}


def find_driver() -> Found:
    """Return the driver version, compute mode and MIG mode of each GPU, from the probe ``driver``."""
    answer = ask("driver", deadline_s=DRIVER_S)
    gpus, texts = answer["gpus"], []
    for gpu in gpus:
        text = f"GPU {gpu['index']}: driver {gpu['driver_version']}, compute mode {gpu['compute_mode']}"
        text += f", MIG {gpu['mig_mode']}" if gpu["mig_mode"] else ""
        if gpu["compute_mode"] == "EXCLUSIVE_PROCESS":
            text += " (one process at a time, so mode mp needs MPS)"
        texts.append(text)
    usable = all(gpu["compute_mode"] == "DEFAULT" for gpu in gpus) if gpus else None
    return usable, "; ".join(texts) or answer["problem"], {"gpus": gpus}


def find_cuda_ipc(place: str | None) -> Found:
    """Check, by doing it, whether two processes can share memory of the GPU ``place``."""
    if place is None:
        return None, "no GPU to share memory on", {}
    ask("shares", place, deadline_s=SHARE_S)
    return True, "a tensor sent to a second process was written there and read back", {}


def find_green_contexts(on_gpu: bool, problem: str | None) -> Found:
    """Return whether green contexts can be created; ``problem`` is why not."""
    if not on_gpu:
        return None, "no GPU to divide", {}
    return problem is None, problem or "can be created", {}


def find_mps_binary() -> Found:
    """Return the path of the program that starts an MPS daemon."""
    from splitwiser.placement.mps_gpu import CONTROL

    path = shutil.which(CONTROL)
    return (True, path, {"path": path}) if path else (None, f"{CONTROL} is not on PATH", {"path": None})


def find_mps_daemon() -> Found:
    """Return the MPS daemon that a process with this environment would be a client of, and its owner."""
    from splitwiser.placement.mps_daemon import running_daemon

    daemon = running_daemon()
    if daemon is None:
        return None, "none is running", {}
    figures = {"pid": daemon.pid, "user": daemon.user, "pipe_directory": str(daemon.pipe_directory)}
    return True, f"{daemon}", figures


# the processor


def find_processor() -> Found:
    """Return the processor and which of :data:`PROCESSOR_FEATURES` it has."""
    import torch

    from splitwiser.machine.describe import describe_machine
    from splitwiser.model.kernels.build import processor_flags

    name = describe_machine(torch.device("cpu"))["processor"]
    flags = set(processor_flags().decode().split())
    features = [feature for feature in PROCESSOR_FEATURES if feature in flags]
    return (
        True,
        f"{name}: {', '.join(features) or 'no known vector extension'}",
        {"name": name, "features": features},
    )


def find_cores() -> Found:
    """Return the number of cores, a container's quota of them, and the number of PyTorch's threads."""
    import torch

    cores, threads, quota = len(os.sched_getaffinity(0)), torch.get_num_threads(), cgroup.cpu_quota()
    figures = {"cores": cores, "quota": quota, "torch_threads": threads}
    text = f"{cores} that this process may use, {threads} PyTorch threads"
    if quota is not None and quota < cores:
        whole = max(1, int(quota))
        text += f", but the container may use the time of {quota:g}: start runs under taskset -c with {whole} of them"
        return False, text, figures
    return True, text, figures


def find_load() -> Found:
    """Measure how much of the cores other processes use now."""
    load = machine_load.measure_load()
    named = ("load_average", "others_cores", "cpu_pressure")
    figures = {name: load.record[name] for name in named}
    if load.others_cores is None:
        return None, "the system does not report what others use", figures
    text = f"others use {load.others_cores:.1f} of {load.cores:g} cores now, load average {load.load_average}"
    if load.crowded:
        return None, f"{text}: measurements made meanwhile do not show this machine's own speed", figures
    return True, text, figures


def find_compiler() -> Found:
    """Return the path and version of the C++ compiler."""
    path = shutil.which("g++")
    if path is None:
        return None, "no g++ on PATH", {"path": None}
    version = run_command([path, "--version"], TOOL_S).splitlines()[0]
    return True, f"{path}, {version}", {"path": path}


def find_kernel(place: str | None) -> Found:
    """Build the kernels as a run does, so that the result is that of a run."""
    import torch

    from splitwiser.machine import user_cache
    from splitwiser.model.kernels import gpu_attention as gpu_kernel
    from splitwiser.model.kernels.choose import load_kernels

    kernels, described = load_kernels(constants.KERNELS, torch.device(place or "cpu"), torch.bfloat16, [])
    compiled, text = kernels.decode is not None, described["decode_attention"]
    cache, kept = None, ""
    try:
        cache = (user_cache if place in (None, "cpu") else gpu_kernel).cache_directory()
        kept = f"kept in {cache}"
    except OSError as error:
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
    """Return whether the folder ``path`` can be written to, or created if it does not exist."""
    existing = next(each for each in [path, *path.parents] if each.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


# memory


def find_main_memory() -> Found:
    """Return the available main memory, and what a container's limit leaves."""
    from splitwiser.machine.memory import available_memory

    memory = psutil.virtual_memory()
    headroom, free = cgroup.memory_headroom(), available_memory()
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    text = f"{format_size(memory.available)} of {format_size(memory.total)} available"
    if headroom is not None:
        text += f"; the container's limit leaves {format_size(headroom)}"
    if address_space != resource.RLIM_INFINITY:
        text += f"; ulimit -v allows {format_size(address_space)} of addresses, PyTorch's own included"
    return True, text, {"free_bytes": free, "total_bytes": memory.total, "container_room_bytes": headroom}


def find_shared_memory() -> Found:
    """Check, by doing it, whether two processes can share main memory as the workers of mode mp do."""
    from splitwiser.placement.checks import find_memfd_problem

    if problem := find_memfd_problem():
        return False, problem, {}
    ask("shares", "cpu", deadline_s=SHARE_S)
    return True, "an anonymous file sent to a second process was written there and read back", {}


def find_dev_shm(on_gpu: bool) -> Found:
    """Compare the free space in ``/dev/shm``, which containers keep small, with what a run needs there."""
    shm = os.statvfs("/dev/shm")
    size, free = shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize
    ok = not on_gpu or free >= IPC_COUNTERS
    text = f"{format_size(free)} of {format_size(size)} free; "
    if on_gpu:
        text += f"CUDA IPC needs {IPC_COUNTERS // 1000} kB of it, weights and pool none"
    else:
        text += "a run needs none of it: weights and pool are in anonymous files in main memory"
    return ok, text, {"size_bytes": size, "free_bytes": free}


def find_open_files() -> Found:
    """Return how many files a process may open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY or limit >= FEW_FILES:
        return True, "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} allowed", {"limit": limit}
    return False, f"{limit} allowed, too few for many workers: ulimit -n {FEW_FILES} or more", {"limit": limit}


# the hub


def find_hub(name: str, wanted: bool) -> Found:
    """Return where the hub's cache is and, if ``wanted``, check whether the hub serves the model ``name``, if it has one."""
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
    try:
        ask("hub", name, deadline_s=HUB_S)
    except ProbeError as error:
        return False, f"{hub.ENDPOINT}: {error}; {setting}; {cache}", {**figures, "problem": str(error)}
    return True, f"{name or 'the hub'} is available from {hub.ENDPOINT}; {setting}; {cache}", figures
