"""Configuration of an engine: model, device, number format, KV pool, and the placement of the two phases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from splitwiser import constants
from splitwiser.engine.messages import WorkerSpec
from splitwiser.engine.policy import POLICIES, find_policy, policy_name
from splitwiser.engine.schedule import SCHEDULES, find_schedule, keeps_itl_target, measures_budget
from splitwiser.errors import InputError, unknown_name
from splitwiser.model.adapters.files import AdapterFiles, AdaptersGiven, find_adapters, find_own_adapters
from splitwiser.model.checkpoints.catalog import resolve_model
from splitwiser.model.dtypes import KV_SPELLINGS, dtype_name
from splitwiser.model.kernels.choose import LOADERS
from splitwiser.options import Options, check_counts, option, option_fields
from splitwiser.placement.layout import WorkerLayout, parse_layout
from splitwiser.placement.modes import MODES, Mode, find_backend, find_mode
from splitwiser.request import NO_ADAPTER
from splitwiser.text import parse_bytes, parse_device

LOAD_FORMATS = ("auto", "dummy")
GENERATION_CONFIGS = ("none", "checkpoint")
QUANTIZATIONS = ("none", "int8")
_PARALLEL = "one device serves the whole model"
_NOT_TAKEN = {  # of vLLM's LLM and of transformers' from_pretrained: what is here instead, or why it is not
    "tensor_parallel_size": _PARALLEL,
    "pipeline_parallel_size": _PARALLEL,
    "data_parallel_size": _PARALLEL,
    "gpu_memory_utilization": "kv_memory gives the KV pool's size, such as 4GiB",
    "kv_cache_memory_bytes": "here it is kv_memory, such as 4GiB",
    "max_num_seqs": "here it is max_batch",
    "max_num_batched_tokens": "here it is prefill_tokens, for the prompt tokens of a prefill step or all of a hybrid one",
    "enable_chunked_prefill": "here it is schedule='hybrid'; prompts longer than prefill_tokens are always split, except "
    "those of an encoder-decoder",
    "scheduling_policy": "here it is policy",
    "max_model_len": "a request may use all positions of the model; kv_memory limits the pool",
    "block_size": "BLOCK_TOKENS in constants.py",
    "enable_prefix_caching": "here it is prefix_caching",
    "enforce_eager": "here it is kernels, auto or plain",
    "kv_cache_dtype": "here it is kv_dtype",
    "trust_remote_code": "models run with transformers' own code alone",
    "tokenizer": "it is the checkpoint's own",
    "revision": "give a checkpoint directory",
    "speculative_config": "tokens are made one by one",
    "torch_dtype": "here it is dtype",
    "device_map": "here it is device",
    "attn_implementation": "attention reads the KV pool; kernels is auto or plain",
}

SHARES = ("fixed", "auto", "none")
MPS_DAEMONS = ("private", "existing")
KV_TRANSFERS = ("shared", "copy")


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelConfig(Options):
    """Model, device, number format and size of the KV pool. Raises :class:`InputError` for invalid values."""

    model: str | Path = option(constants.MODEL, "name of --models, checkpoint directory, GGUF file or hub id")
    models: str | Path = option(str(constants.MODELS), "YAML file of the models known by name")
    dtype: str = option(
        constants.DTYPE, "float32 (fp32, float), bfloat16 (bf16), float16 (fp16, half), or auto: the checkpoint's own"
    )
    device: str = option(constants.DEVICE, "auto, cpu, cuda or cuda:N")
    gpu_id: int | None = option(None, "the GPU to use, as the original's flag; the same as --device cuda:N")
    load_format: str = option(constants.LOAD_FORMAT, "auto reads weights; dummy draws random ones, for timing")
    kv_memory: str = option(constants.KV_MEMORY, "size of the KV pool, such as 512MiB, or auto")
    kv_dtype: str = option(
        constants.KV_DTYPE,
        "what the KV pool stores, on a CPU: bfloat16 (bf16); int8, with a scale for each token and head; auto, as --dtype",
    )
    quantization: str = option(
        constants.QUANTIZATION,
        "int8: weights and inputs of linear layers as whole numbers, on a CPU, the rest in --dtype bfloat16; none",
    )
    prefill_tokens: int | None = option(
        None,
        f"most prompt tokens in one prefill step (if not given, {constants.PREFILL_TOKENS:,}); with schedule hybrid, most "
        "tokens in one step (if not given, what saturates the device, by steps measured at the start)",
    )
    kernels: str = option(
        constants.KERNELS, "auto compiles what is faster so, where there is a compiler; plain does not"
    )
    seed: int = option(
        constants.SEED,
        "of in-context examples, lengths, arrivals, random prompts, dummy weights and drawn tokens",
        "sampling",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))  # one spelling in records, and in the keys of a sweep
        object.__setattr__(self, "kv_dtype", dtype_name(self.kv_dtype, "--kv_dtype", KV_SPELLINGS))
        if self.gpu_id is not None and self.device not in (constants.DEVICE, f"cuda:{self.gpu_id}"):
            raise InputError(f"--gpu_id {self.gpu_id} and --device {self.device} disagree; give one of them")
        parse_device(self.device)
        if self.load_format not in LOAD_FORMATS:
            raise unknown_name("--load_format", self.load_format, LOAD_FORMATS)
        if self.kernels not in LOADERS:
            raise unknown_name("--kernels", self.kernels, LOADERS)
        if self.kv_memory != "auto":
            parse_bytes(self.kv_memory)
        check_counts(self, "prefill_tokens")
        if self.quantization not in QUANTIZATIONS:
            raise unknown_name("--quantization", self.quantization, QUANTIZATIONS)
        if self.quantization != "none":
            self._check_quantization()

    def _check_quantization(self) -> None:
        if self.dtype not in ("auto", "bfloat16"):
            raise InputError(
                f"--quantization {self.quantization} needs --dtype bfloat16 for the rest, not {self.dtype}"
            )
        if self.kernels == "plain":
            raise InputError(f"--quantization {self.quantization} needs --kernels auto")

    @property
    def step_tokens(self) -> int:
        """Most prompt tokens in one prefill step, and most tokens in one hybrid step if its budget is not measured."""
        return constants.PREFILL_TOKENS if self.prefill_tokens is None else self.prefill_tokens

    @property
    def device_name(self) -> str:
        """Device name that ``device`` and ``gpu_id`` give together."""
        return self.device if self.gpu_id is None else f"cuda:{self.gpu_id}"


@dataclass(frozen=True, kw_only=True, repr=False)
class EngineConfig(ModelConfig):
    """Complete configuration of an engine.

    From Python, ``workers`` may also be a list of mappings with ``role``, ``count`` and ``share``. Raises
    :class:`InputError` for values that are invalid on any machine; :func:`splitwiser.placement.checks.find_mode_problem`
    checks this one.
    """

    NOT_TAKEN: ClassVar[Mapping[str, str]] = _NOT_TAKEN

    mode: str = option(constants.MODE, f"how the phases are placed: {', '.join(MODES)}")
    backend: str = option(
        constants.BACKEND, "hf: this project's own engine over transformers' models; vllm: unmodified vLLM's"
    )
    backend_python: str | None = option(
        None, "Python of the back end's environment, by default the one that scripts/install_backend.sh makes"
    )
    kv_transfer: str = option(
        constants.KV_TRANSFER,
        "backend vllm, from prefill to decode engines: shared, one KV pool for all; copy, one for each, and copied blocks",
    )
    workers: str | Sequence[dict[str, Any]] = option(
        constants.WORKERS,
        "worker layout of modes mp, mps, green: YAML file, name of configs/workers, or text; empty: one of each phase",
    )
    share: str = option(
        constants.SHARE,
        "how workers divide the device: fixed, by their shares; auto, by --itl_target_ms (mp on a CPU, green); none",
    )
    itl_target_ms: float | None = option(
        None,
        "what decode keeps between two tokens: with share auto by its part of the device (if not given, "
        f"{constants.ITL_TARGET_MS:g}), with schedule hybrid by the size of chunks (if not given, as --prefill_tokens "
        f"says), in mode mp on a CPU by waiting while prompts are backlogged (if not given, {constants.BACKLOG_ITL_MS:g})",
    )
    lend: bool = option(constants.LEND, "idle workers lend their part of the device, step by step")
    second_lane: bool = option(
        constants.SECOND_LANE, "mode mp on a CPU: prefill a backlog of prompts in the time between decode steps too"
    )
    decode_priority: bool = option(
        constants.DECODE_PRIORITY, "on a GPU, decode's kernels go before prefill's (modes mps, green)"
    )
    mps: str = option(constants.MPS, "mode mps: private starts an MPS daemon for this run; existing uses the one there")
    exclusive: bool = option(
        constants.EXCLUSIVE, "mode mps: GPU in compute mode EXCLUSIVE_PROCESS for this run; needs root"
    )
    policy: str = option(
        constants.POLICY,
        f"order of admission and prefill: {', '.join(POLICIES)}, or MODULE:CLASS of your own; with parameters, "
        "NAME:ageing_s=5",
    )
    schedule: str = option(
        constants.SCHEDULE,
        f"what mixed workers, such as mode sequential's, run next: {', '.join(SCHEDULES)}, or MODULE:CLASS of your own",
    )
    reserve: bool = option(
        constants.RESERVE,
        "reserve KV blocks for the longest answer when a request is admitted; else it takes them as it grows, and the last "
        "one is preempted and recomputed where none is free",
    )
    prefix_caching: bool | None = option(
        constants.PREFIX_CACHING,
        "requests that begin alike share the KV blocks of their beginning; by default for cases with in-context examples",
    )
    max_batch: int = option(constants.MAX_BATCH, "most requests in one decode step")
    batch_size: int = option(constants.BATCH_SIZE, "mode generate: rows of a padded batch")
    generation_config: str = option(
        "none",
        "checkpoint: sampling parameters that a request leaves at their default are those of the checkpoint's "
        "generation_config.json; none: they are not",
        "sampling",
    )
    adapters: AdaptersGiven = option(
        constants.ADAPTERS,
        "adapters as peft saves them: NAME=DIRECTORY, or the NAME of one that comes with the model",
        singular="adapter",
    )
    use_adapter: str | None = option(
        None, "adapter of requests that name none; by default the only one if one is given, else none: the model alone"
    )
    merge_adapter: bool = option(
        constants.MERGE_ADAPTER, "merge the one LoRA adapter into the weights, for all requests"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "max_batch", "batch_size")
        if self.generation_config not in GENERATION_CONFIGS:
            raise unknown_name("--generation_config", self.generation_config, GENERATION_CONFIGS)
        if self.adapters or self.use_adapter or self.merge_adapter:
            self._check_adapters()
        if self.share not in SHARES:
            raise unknown_name("--share", self.share, SHARES)
        if self.itl_target_ms is not None and not 0 < self.itl_target_ms < float("inf"):
            raise InputError(f"--itl_target_ms must be more than 0 milliseconds, not {self.itl_target_ms}")
        mode = find_mode(self.mode)
        object.__setattr__(self, "policy", policy_name(self.policy))  # one spelling in records, as of dtype
        find_policy(self.policy)
        if self.policy != constants.POLICY and mode.layout is None:
            raise InputError(
                f"mode {mode.name} runs transformers' own engine; --policy {self.policy} applies to other modes"
            )
        find_schedule(self.schedule)
        for name in ("reserve", "prefix_caching"):
            if getattr(self, name) and mode.layout is None:
                raise InputError(f"mode {mode.name} runs transformers' own engine; --{name} applies to other modes")
        if self.kv_dtype != "auto" and mode.layout is None:
            raise InputError(f"mode {mode.name} runs transformers' own engine; --kv_dtype applies to other modes")
        if self.quantization != "none" and mode.layout is None:
            raise InputError(f"mode {mode.name} runs transformers' own engine; --quantization applies to other modes")
        if self.workers and not mode.laid_out:
            can = ", ".join(each.name for each in MODES.values() if each.laid_out)
            raise InputError(f"--workers are laid out in modes {can}, not in mode {mode.name}")
        if self.layout is not None:
            _check_layout(mode, self.layout, self.share)
        if self.schedule != constants.SCHEDULE and not self.mixes:
            raise InputError(
                f"--schedule {self.schedule} is for mixed workers, which do both phases (mode sequential, or --workers "
                f"'[{{role: mixed}}]'), and mode {mode.name} has none here"
            )
        if (
            self.itl_target_ms is not None
            and self.share != "auto"
            and not self.has_second_lane
            and not (self.mixes and keeps_itl_target(self.schedule))
        ):
            raise InputError(
                f"--itl_target_ms {self.itl_target_ms:g} is kept by --share auto or by --schedule hybrid, and in mode mp "
                "with a second lane; choose one of them"
            )
        self._check_mps()
        self._check_backend()

    @cached_property
    def layout(self) -> WorkerLayout | None:
        """Layout of the workers, as given or the mode's default; None in mode ``generate``, which has no workers."""
        return parse_layout(self.workers) if self.workers else find_mode(self.mode).layout

    @property
    def specs(self) -> tuple[WorkerSpec, ...]:
        """Workers of the layout; empty in mode ``generate``."""
        return self.layout.workers if self.layout else ()

    @property
    def mixes(self) -> bool:
        """Whether there are mixed workers, so that there is something to schedule."""
        return any(spec.role == "mixed" for spec in self.specs)

    @property
    def has_second_lane(self) -> bool:
        """Whether the prefill worker opens a second lane for a backlog, if its device is a CPU."""
        return self.second_lane and self.may_have_second_lane

    @property
    def may_have_second_lane(self) -> bool:
        """Whether ``second_lane`` decides that."""
        one_prefills = [spec.role for spec in self.specs].count("prefill") == 1
        return one_prefills and self.lend and self.share == "fixed" and self.mode == "mp" and self.backend == "hf"

    def describe_unused(self, takes_second_lane: bool) -> list[str]:
        """Return a note of each option that differs from its default and changes nothing in this configuration, with a model
        that ``takes_second_lane`` on its device."""
        theirs = "mode generate runs transformers' own engine"
        generates = find_mode(self.mode).layout is None
        unused = dict.fromkeys(("prefill_tokens", "max_batch", "kv_memory"), theirs) if generates else {}
        if not generates:
            unused["batch_size"] = "it is for mode generate"
        if not (takes_second_lane and self.may_have_second_lane):
            unused["second_lane"] = (
                "a second lane is for decoders without rotary scaling by length in mode mp on a CPU, with one prefill "
                "worker, fixed shares and lending"
            )
        options, given = option_fields(EngineConfig), {name: getattr(self, name) for name in unused}
        return [
            f"--{'no-' if given[name] is False else ''}{name} changes nothing: {reason}"
            for name, reason in unused.items()
            if given[name] != options[name].default
        ]

    @property
    def measures_budget(self) -> bool:
        """Whether mixed workers measure how many tokens their steps are to have."""
        return self.prefill_tokens is None and self.itl_target_ms is None and measures_budget(self.schedule)

    @property
    def kept_itl_s(self) -> float:
        """What share ``auto``, and decode beside a second lane, keep between two tokens, in seconds."""
        default = constants.ITL_TARGET_MS if self.share == "auto" else constants.BACKLOG_ITL_MS
        return (default if self.itl_target_ms is None else self.itl_target_ms) / 1e3

    @cached_property
    def adapter_files(self) -> dict[str, AdapterFiles]:
        """The adapters by name."""
        return find_adapters(self.adapters, resolve_model(self.model, self.models)) if self.adapters else {}

    @property
    def own_adapters(self) -> dict[str, AdapterFiles]:
        """The adapters that come with the model, by name."""
        return find_own_adapters(resolve_model(self.model, self.models))

    @property
    def default_adapter(self) -> str:
        """Name of the adapter of requests that name none; ``none`` for the model alone."""
        if self.use_adapter is not None:
            return self.use_adapter
        names = list(self.adapter_files)
        return names[0] if len(names) == 1 else NO_ADAPTER.name

    def _check_adapters(self) -> None:
        files = self.adapter_files
        if self.use_adapter not in (None, NO_ADAPTER.name, *files):
            raise unknown_name("--use_adapter", self.use_adapter, [*files, NO_ADAPTER.name])
        if not self.merge_adapter:
            return
        if [each.kind for each in files.values()] != ["LORA"]:
            given = ", ".join(f"{name} ({each.kind_name})" for name, each in files.items())
            said = f"the adapters are: {given}" if given else "give one with --adapter"
            raise InputError(f"--merge_adapter merges one LoRA adapter into the model; {said}")
        if self.use_adapter == NO_ADAPTER.name:
            raise InputError("--use_adapter none: a merged adapter runs with every request; leave --merge_adapter out")

    def _check_backend(self) -> None:
        backend = find_backend(self.backend)
        if self.backend_python is not None and not backend.python:
            raise InputError(f"--backend_python goes with another back end than {backend.name}; give --backend vllm")
        if backend.modes and self.mode not in backend.modes:
            raise InputError(
                f"backend {backend.name} runs in modes {', '.join(backend.modes)}, not in mode {self.mode}"
            )
        if self.kv_transfer not in KV_TRANSFERS:
            raise unknown_name("--kv_transfer", self.kv_transfer, KV_TRANSFERS)
        if self.kv_transfer == "copy" and (not backend.python or all(spec.role == "mixed" for spec in self.specs)):
            raise InputError("--kv_transfer copy goes with --backend vllm and prefill and decode workers")
        for name, reason in backend.not_taken.items():
            if getattr(self, name) != option_fields(EngineConfig)[name].default:
                raise InputError(f"--{name} does not go with backend {backend.name}: {reason}")
        if backend.modes and self.share == "auto":
            raise InputError(f"--share auto does not go with backend {backend.name}, whose engines keep their cores")

    def _check_mps(self) -> None:
        if self.mps not in MPS_DAEMONS:
            raise unknown_name("--mps", self.mps, MPS_DAEMONS)
        if self.mps == "existing" and self.mode != "mps":
            raise InputError(f"--mps existing goes with mode mps, not with mode {self.mode}")
        if self.exclusive and (self.mode != "mps" or self.mps == "existing"):
            raise InputError(
                "--exclusive goes with mode mps and a private daemon: it is for a GPU that nobody else uses"
            )


def _check_layout(mode: Mode, layout: WorkerLayout, share: str) -> None:
    """Raise :class:`InputError` for a layout that ``mode`` or ``share`` auto does not support."""
    if mode.one_of_each and sorted(spec.role for spec in layout.workers) != ["decode", "prefill"]:
        raise InputError(
            f"mode {mode.name} has one prefill and one decode worker, not {layout}; use mode mp for others"
        )
    if share != "auto":
        return
    if not mode.moves_shares:
        can = " or ".join(each.name for each in MODES.values() if each.moves_shares)
        raise InputError(
            f"--share auto moves shares while a run goes on, which mode {mode.name} cannot; use mode {can}"
        )
    if any(group.role == "mixed" for group in layout.groups):
        raise InputError("--share auto divides between prefill and decode workers, and mixed ones are both")
    if any(group.share is not None for group in layout.groups):
        raise InputError("--share auto chooses the shares itself; leave them out of the workers, or use --share fixed")
