"""``splitwiser doctor``: what this machine has, which modes will work on it for a model, and why each other one will not.

Every check answers with a finding; one that breaks becomes a finding with the reason. PyTorch and transformers are imported
where a check needs them, so that the rest is still found where they are broken.
"""

import os
import pwd
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from splitwiser import cgroup, constants
from splitwiser.catalog import CatalogEntry, resolve_model
from splitwiser.errors import InputError, UnsupportedModelError, first_line
from splitwiser.probe import ProbeError, ask, run_command
from splitwiser.summary import columns

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from splitwiser.kv_pool import LayerShape

MODES = ("generate", "sequential", "mp", "mps", "green")
SECTIONS = ("software", "gpu", "processor", "memory", "hub", "model")
DEVICES_S, SHARE_S, MODE_S, HUB_S, TOOL_S = 60.0, 90.0, 60.0, 20.0, 10.0  # longest that each question may take
FEW_FILES = 256  # a run opens some tens of files, and a pipe for every pair of processes
IPC_COUNTERS = 10_000 * 8  # bytes of /dev/shm that PyTorch's CUDA IPC takes (torch/csrc/CudaIPCTypes.h)
# what the decode kernel and PyTorch's products are fast with, as x86 and Arm processors name it
PROCESSOR_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
DOWNLOAD = "not in the local cache, so a run downloads it first"
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the doctor is asked about: a run's model, numbers, pool and device, and whether to try the hub."""

    model: str = constants.MODEL
    dtype: str = constants.DTYPE
    load_format: str = constants.LOAD_FORMAT
    kv_memory: str = constants.KV_MEMORY
    max_batch: int = constants.MAX_BATCH
    device: str = constants.DEVICE
    hub: bool = False


@dataclass(frozen=True)
class Finding:
    """What one check found. ``ok`` is False for what is missing or stands in the way, None for what does not apply or was
    not tried. ``figures`` are for machines: bytes, counts, names."""

    section: str
    name: str
    ok: bool | None
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


Found = tuple[bool | None, str, dict[str, Any]]  # ok, text and figures of a finding


@dataclass(frozen=True)
class ModeFinding:
    """Whether ``mode`` will work, and the reason if not (or what to know if it does)."""

    mode: str
    works: bool
    note: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and what they mean for each mode."""

    model: str
    device: str | None
    findings: list[Finding]
    modes: list[ModeFinding]

    @property
    def works(self) -> bool:
        """Whether at least one mode works."""
        return any(mode.works for mode in self.modes)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``: ``works``, ``model``, ``device``, ``findings`` and ``modes``, each of the last two a list of the
        fields of :class:`Finding` and :class:`ModeFinding`."""
        return {"works": self.works, **asdict(self)}

    def __str__(self) -> str:
        marks = {True: "ok", False: "NO", None: "-"}
        lines = []
        for section in SECTIONS:
            rows = [(f"  {each.name}", marks[each.ok], each.text) for each in self.findings if each.section == section]
            lines += [section, columns(rows), ""]
        table = [(each.mode, "yes" if each.works else "no", each.note) for each in self.modes]
        return "\n".join([*lines, columns([("mode", "works", "why not / note"), *table])])


def diagnose(question: Question) -> Diagnosis:
    """Look at everything. Raises :class:`InputError` on a model, a type or a size that does not exist."""
    entry = resolve_model(question.model)
    if question.max_batch < 1:
        raise InputError(f"max_batch must be 1 or more, not {question.max_batch}")
    look = _Look()
    look("software", "python", lambda: (True, f"{sys.version.split()[0]} at {sys.executable}", {}))
    pytorch = look("software", "pytorch", _pytorch)
    transformers = look("software", "transformers", _transformers)
    if pytorch.ok:
        _check_form(question)
    gpus: list[dict[str, Any]] = look("gpu", "devices", _gpus).figures.get("devices", [])
    place: str | None = look("gpu", "device", _device, question.device, len(gpus)).figures.get("device")
    gpu = gpus[int(place.removeprefix("cuda:"))] if place and place != "cpu" else None
    memory = look("memory", "main_memory", _main_memory)
    hub = look("hub", "hub", _hub, entry, question.hub)
    free = gpu["free_bytes"] if gpu else memory.figures.get("free_bytes")
    model = Finding("model", "model", None, "cannot be told without PyTorch, transformers and a device")
    needs = _Needs()
    if transformers.ok and place and free is not None:
        model, needs = _examine_model(entry, question, place, free, hub)
    look.findings["model"] = model
    look("model", "weights_and_pool", needs.finding, free)
    look("memory", "shared_memory", _shared_memory)
    look("memory", "dev_shm", _dev_shm, gpu is not None)
    look("memory", "open_files", _open_files)
    look("gpu", "nvidia_smi", _nvidia_smi)
    look("gpu", "cuda_ipc", _cuda_ipc, place if gpu else None)
    refused = {mode: _find_mode_problem(mode, place) for mode in MODES} if pytorch.ok and place else {}
    look("gpu", "green_contexts", _green_contexts, gpu is not None, refused.get("green"))
    look("gpu", "mps_binary", _mps_binary)
    look("gpu", "mps_daemon", _mps_daemon)
    look("processor", "processor", _processor)
    look("processor", "cores", _cores)
    look("processor", "compiler", _compiler)
    look("processor", "kernel", _kernel, place)
    modes = [_judge(mode, look.findings, refused.get(mode), needs) for mode in MODES]
    look.close()
    return Diagnosis(entry.name, place, list(look.findings.values()), modes)


class _Look:
    """Makes checks, keeps their findings by name and shows on a terminal what is being looked at."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}
        self._line = tqdm(total=0, bar_format="looking at {desc}", disable=None, leave=False)

    def __call__(self, section: str, name: str, check: Callable[..., Found], *given: object) -> Finding:
        self._line.set_description_str(name)
        try:
            found = check(*given)
        except (InputError, ProbeError) as error:
            found = False, str(error), {}
        except Exception as error:
            found = False, f"cannot be told ({type(error).__name__}: {first_line(error)})", {}
        self.findings[name] = Finding(section, name, *found)
        return self.findings[name]

    def close(self) -> None:
        """Take the line away."""
        self._line.close()


def _check_form(question: Question) -> None:
    """Raises :class:`InputError` on a device or size of a form that there is not; whether it is here is a finding."""
    from splitwiser.device import resolve_device
    from splitwiser.kv_pool import find_pool_problem

    resolve_device(question.device, gpus=sys.maxsize)
    find_pool_problem(question.kv_memory, sys.maxsize)


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.1f} MiB"


# software


def _pytorch() -> Found:
    try:
        import torch
    except Exception as error:
        return False, f"cannot be imported ({type(error).__name__}: {first_line(error)})", {}
    cuda = torch.version.cuda
    build = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    return True, f"{torch.__version__}, {build}", {"version": str(torch.__version__), "cuda": cuda}


def _transformers() -> Found:
    try:
        import accelerate
        import transformers
        from transformers import AutoModelForCausalLM  # noqa: F401  # what is imported lazily breaks only here
    except Exception as error:
        return False, f"cannot be imported ({type(error).__name__}: {first_line(error)})", {}
    versions = {"version": transformers.__version__, "accelerate": accelerate.__version__}
    return True, f"{transformers.__version__}, accelerate {accelerate.__version__}", versions


# the GPU


def _gpus() -> Found:
    import torch

    if torch.version.cuda is None:
        return None, "none can be used: this PyTorch is built without CUDA", {"devices": []}
    answer = ask("devices", deadline_s=DEVICES_S)
    described = [
        f"cuda:{each['index']} {each['name']}, compute capability {each['compute_capability']}, {each['sms']} SMs, "
        f"{_size(each['free_bytes'])} of {_size(each['total_bytes'])} free"
        for each in answer["devices"]
    ]
    return bool(described), "; ".join(described) or f"none: {answer['problem']}", {"devices": answer["devices"]}


def _device(device: str, gpus: int) -> Found:
    from splitwiser.device import resolve_device

    place = str(resolve_device(device, gpus))
    return True, f"{place} ({'as asked for' if device != 'auto' else 'chosen by auto'})", {"device": place}


def _nvidia_smi() -> Found:
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


def _cuda_ipc(place: str | None) -> Found:
    if place is None:
        return None, "no GPU to share memory on", {}
    ask("shares", place, deadline_s=SHARE_S)
    return True, "a tensor sent to a second process was written there and read back", {}


def _green_contexts(on_gpu: bool, problem: str | None) -> Found:
    if not on_gpu:
        return None, "no GPU to divide", {}
    return problem is None, problem or "can be made", {}


def _mps_binary() -> Found:
    from splitwiser.checks import MPS_BINARY

    path = shutil.which(MPS_BINARY)
    return (True, path, {"path": path}) if path else (None, f"{MPS_BINARY} is not on PATH", {"path": None})


@dataclass(frozen=True)
class RunningDaemon:
    """An MPS control daemon that runs, whose it is, and where its pipes lie."""

    pid: int
    user: str
    pipe_directory: str


def running_daemon() -> RunningDaemon | None:
    """The MPS daemon that an unrelated program of this environment would reach, if one runs."""
    directory = os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"
    try:
        pid = int((Path(directory) / "nvidia-cuda-mps-control.pid").read_text(encoding="ascii"))
        owner = Path(f"/proc/{pid}").stat().st_uid
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    if not name.startswith("nvidia-cuda-mps"):  # the number has gone to another process
        return None
    try:
        user = pwd.getpwuid(owner).pw_name
    except KeyError:
        user = str(owner)
    return RunningDaemon(pid, user, directory)


def _mps_daemon() -> Found:
    daemon = running_daemon()
    if daemon is None:
        return None, "none runs", {}
    text = f"process {daemon.pid} of user {daemon.user} serves {daemon.pipe_directory}"
    if shutil.which("nvidia-cuda-mps-control"):
        run_command(["nvidia-cuda-mps-control"], TOOL_S, "get_server_list\n")
        text += " and answers"
    return True, text, asdict(daemon)


# the processor


def _processor() -> Found:
    import torch

    from splitwiser.cpu_kernel import processor_flags
    from splitwiser.machine import describe_machine

    name = describe_machine(torch.device("cpu"))["processor"]
    flags = set(processor_flags().decode().split())
    features = [feature for feature in PROCESSOR_FEATURES if feature in flags]
    return (
        True,
        f"{name}: {', '.join(features) or 'no vector extension known here'}",
        {"name": name, "features": features},
    )


def _cores() -> Found:
    import torch

    cores, threads, quota = len(os.sched_getaffinity(0)), torch.get_num_threads(), cgroup.cpu_quota()
    figures = {"cores": cores, "quota": quota, "torch_threads": threads}
    text = f"{cores} that this process may use, {threads} PyTorch threads"
    if quota is not None and quota < cores:
        whole = max(1, int(quota))
        text += f", but the container may take the time of {quota:g}: start runs under taskset -c with {whole} of them"
        return False, text, figures
    return True, text, figures


def _compiler() -> Found:
    path = shutil.which("g++")
    if path is None:
        return None, "no g++ on PATH", {"path": None}
    version = run_command([path, "--version"], TOOL_S).splitlines()[0]
    return True, f"{path}, {version}", {"path": path}


def _kernel(place: str | None) -> Found:
    """Makes the kernel, as a run would, so that the answer is that of a run."""
    import torch

    from splitwiser.cpu_kernel import cache_directory, load_kernel

    kernel, text = load_kernel(constants.KERNELS, torch.device(place or "cpu"))
    cache = cache_directory()
    figures = {
        "kernel": text,
        "compiled": kernel is not None,
        "cache": str(cache),
        "cache_writable": _is_writable(cache),
        "openmp": torch.backends.openmp.is_available(),
    }
    text += f"; kept in {cache}" if kernel is not None else ""
    text += "" if figures["openmp"] else "; PyTorch was built without OpenMP"
    return (None if place != "cpu" else kernel is not None), text, figures


def _is_writable(path: Path) -> bool:
    """Whether ``path`` can be written to, or made if it is not there."""
    there = next(each for each in [path, *path.parents] if each.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


# memory


def _main_memory() -> Found:
    from splitwiser.kv_pool import available_memory, machine_memory

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room, free = cgroup.memory_room(), available_memory()
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    text = f"{_size(machine_memory())} of {_size(total)} available"
    if room is not None:
        text += f"; the container's limit leaves {_size(room)}"
    if address_space != resource.RLIM_INFINITY:
        text += f"; ulimit -v allows {_size(address_space)} of addresses, PyTorch's own included"
    return True, text, {"free_bytes": free, "total_bytes": total, "container_room_bytes": room}


def _shared_memory() -> Found:
    from splitwiser.checks import find_memfd_problem

    if problem := find_memfd_problem():
        return False, problem, {}
    ask("shares", "cpu", deadline_s=SHARE_S)
    return True, "an anonymous file sent to a second process was written there and read back", {}


def _dev_shm(on_gpu: bool) -> Found:
    shm = os.statvfs("/dev/shm")
    size, free = shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize
    ok = not on_gpu or free >= IPC_COUNTERS
    text = f"{_size(free)} of {_size(size)} free; "
    if on_gpu:
        text += f"CUDA IPC needs {IPC_COUNTERS // 1000} kB of it, weights and pool none"
    else:
        text += "a run needs none of it: weights and pool lie in anonymous files, which are main memory"
    return ok, text, {"size_bytes": size, "free_bytes": free}


def _open_files() -> Found:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY or limit >= FEW_FILES:
        return True, "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} allowed", {"limit": limit}
    return False, f"{limit} allowed, which many workers use up: ulimit -n {FEW_FILES} or more", {"limit": limit}


# the model


@dataclass(frozen=True)
class _Needs:
    """What a run of the model needs, as far as it is known. ``problem`` stands in the way of every mode, ``dispatch`` of all
    that the engine serves, ``memory`` of those without and with a KV pool."""

    weights: int | None = None
    pool: int | None = None
    about: bool = False
    problem: str | None = None
    dispatch: str | None = None
    memory: dict[bool, str | None] = field(default_factory=dict)
    note: str = ""

    def finding(self, free: int | None) -> Found:
        """The finding on the memory that weights and pool take."""
        figures = {"weights_bytes": self.weights, "pool_bytes": self.pool, "free_bytes": free}
        if self.weights is None or free is None:
            return None, "cannot be told without the model's configuration", figures
        text = f"weights {_size(self.weights)}"
        if self.pool is not None:
            text += f", KV pool {'about ' if self.about else ''}{_size(self.pool)}"
        return not any(self.memory.values()), f"{text}, of {_size(free)} available", figures


def _examine_model(
    entry: CatalogEntry, question: Question, place: str, free: int, hub: Finding
) -> tuple[Finding, _Needs]:
    """The finding on the model and what it needs, told without a weight and without reaching for the hub."""
    from splitwiser.guard import find_dispatch_problem
    from splitwiser.model import plan_model, without_memory

    configured, problem, where = _find_files(entry, question, hub)
    text = problem or f"{entry.name} at {entry.location}" + (f": {where}" if where else "")
    note = where if where == DOWNLOAD else ""
    if not configured and entry.kind == "decoder":  # another is refused before anything is read
        return Finding("model", "model", False if problem else None, text), _Needs(problem=problem, note=note)
    load_format = "dummy" if entry.config and not _is_here(entry, ["config.json"]) else question.load_format
    try:
        # the device has no say in a model's shape, and asking for it here would start CUDA in this process
        _, _, config, dtype = plan_model(question.model, dtype=question.dtype, device="cpu", load_format=load_format)
        module = without_memory(entry, config, dtype)
        dispatch = find_dispatch_problem(module)
        needs = _measure(entry.name, module, question, place, free)
    except UnsupportedModelError as error:
        return Finding("model", "model", False, str(error)), _Needs(problem=str(error))
    except InputError:
        raise
    except Exception as error:
        broken = f"model {entry.name}: {type(error).__name__}: {first_line(error)}"
        return Finding("model", "model", False, broken), _Needs(problem=broken)
    ok = problem is None and dispatch is None
    return Finding("model", "model", ok, dispatch or text), replace(
        needs, problem=problem, dispatch=dispatch, note=note
    )


def _find_files(entry: CatalogEntry, question: Question, hub: Finding) -> tuple[bool, str | None, str]:
    """Whether the model's shape is known here, why it cannot be had, and where it comes from."""
    from splitwiser.model import not_to_be_had

    shape_is_known = bool(entry.config) or _is_here(entry, ["config.json"])
    dummy = question.load_format == "dummy"
    if entry.path:
        lacks = not dummy and not _is_here(entry, WEIGHT_FILES)
        return True, f"model {entry.name}: no weights in {entry.location}" if lacks else None, ""
    if dummy and shape_is_known:
        return True, None, "random weights, nothing to download"
    if _is_here(entry, WEIGHT_FILES):
        return True, None, "in the local cache"
    # numbers of the checkpoint's own type are not known without the checkpoint
    shape_is_known &= question.dtype != "auto" or _is_here(entry, ["config.json"])
    if hub.ok is False or hub.figures.get("offline"):
        why = hub.figures.get("problem") or "HF_HUB_OFFLINE is set"
        return shape_is_known, not_to_be_had(entry, why), ""
    return shape_is_known, None, DOWNLOAD


def _is_here(entry: CatalogEntry, names: Sequence[str]) -> bool:
    """Whether one of the files ``names`` of the model lies in its directory or in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache

    if entry.path:
        return any((Path(entry.location) / name).is_file() for name in names)
    return any(isinstance(try_to_load_from_cache(entry.hub, name), str) for name in names)


def _measure(name: str, module: "PreTrainedModel", question: Question, place: str, free: int) -> _Needs:
    import torch

    from splitwiser.checks import find_memory_problem
    from splitwiser.kv_pool import block_nbytes, parse_bytes, plan_blocks
    from splitwiser.model import max_positions, weights_nbytes

    weights, dtype, device = weights_nbytes(module), module.dtype, torch.device(place)
    memory = {
        pooled: find_memory_problem(name, weights, dtype, question.kv_memory if pooled else "auto", free, device)
        for pooled in (False, True)
    }
    layers = _likely_layers(module.config)
    if question.kv_memory != "auto":
        pool = parse_bytes(question.kv_memory)
    elif layers and weights <= free:
        block = block_nbytes(layers, constants.BLOCK_TOKENS, dtype)
        positions = max_positions(module.config)
        pool = block * plan_blocks(
            layers, "auto", constants.BLOCK_TOKENS, dtype, device, question.max_batch, positions, free - weights
        )
    else:
        pool = None
    return _Needs(weights, pool, question.kv_memory == "auto", memory=memory)


def _likely_layers(config: "PreTrainedConfig") -> "list[LayerShape] | None":
    """What each layer keeps, as most configurations say it; only a forward, as a run makes it, knows."""
    from splitwiser.kv_pool import LayerShape

    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or (heads and getattr(text, "hidden_size", 0) // heads)
    layers = getattr(text, "num_hidden_layers", None)
    return [LayerShape(kv_heads, size, size)] * layers if layers and kv_heads and size else None


# the hub


def _hub(entry: CatalogEntry, wanted: bool) -> Found:
    from huggingface_hub import constants as hub

    cache = f"cache {hub.HF_HUB_CACHE}"
    if not Path(hub.HF_HUB_CACHE).is_dir():
        cache += " (not there yet)"
    if not _is_writable(Path(hub.HF_HUB_CACHE)):
        cache += " (cannot be written)"
    figures = {"offline": bool(hub.HF_HUB_OFFLINE), "cache": hub.HF_HUB_CACHE, "tried": wanted}
    setting = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else "HF_HUB_OFFLINE is not set"
    if not wanted:
        return None, f"not tried (--hub tries it); {setting}; {cache}", figures
    try:
        ask("hub", entry.hub, deadline_s=HUB_S)
    except ProbeError as error:
        return False, f"{hub.ENDPOINT}: {error}; {setting}; {cache}", {**figures, "problem": str(error)}
    return True, f"{entry.hub or 'the hub'} can be had from {hub.ENDPOINT}; {setting}; {cache}", figures


# the modes


def _judge(mode: str, found: dict[str, Finding], refused: str | None, needs: _Needs) -> ModeFinding:
    problem = next((problem for problem in _problems(mode, found, refused, needs) if problem), None)
    if problem:
        return ModeFinding(mode, False, problem)
    notes = [needs.note]
    if mode != "generate" and found["kernel"].ok is False:
        notes.append(f"decode attention: {found['kernel'].figures.get('kernel', found['kernel'].text)}")
    if mode == "mp" and found["device"].figures["device"] == "cpu" and found["cores"].figures.get("cores") == 1:
        notes.append("prefill and decode share one core")
    return ModeFinding(mode, True, "; ".join(filter(None, notes)))


def _problems(mode: str, found: dict[str, Finding], refused: str | None, needs: _Needs) -> Iterator[str | None]:
    """What stands in the way of ``mode``, if anything, in the order in which a run would meet it."""
    for name in ("pytorch", "transformers"):
        if not found[name].ok:
            yield f"{name}: {found[name].text}"
    if not found["device"].ok:
        yield found["device"].text
    yield _find_planned(mode)
    yield refused
    if mode in ("mp", "mps"):
        for name in ("shared_memory", "cuda_ipc"):
            if found[name].ok is False:
                yield f"mode {mode} cannot share memory between processes: {found[name].text}"
    yield needs.problem
    if mode != "generate":
        yield needs.dispatch
    yield needs.memory.get(mode != "generate")


def _find_planned(mode: str) -> str | None:
    from splitwiser.llm import PLANNED_MODES

    return f"mode {mode} is not there yet ({PLANNED_MODES[mode]})" if mode in PLANNED_MODES else None


def _find_mode_problem(mode: str, place: str) -> str | None:
    """As :func:`splitwiser.checks.find_mode_problem`; where that may start CUDA, a process of its own is asked."""
    if place == "cpu" or mode not in ("mps", "green"):
        import torch

        from splitwiser.checks import find_mode_problem

        return find_mode_problem(mode, torch.device(place))
    try:
        answer: str | None = ask("mode", mode, place, deadline_s=MODE_S)
    except ProbeError as error:
        return f"mode {mode}: {error}"
    return answer
