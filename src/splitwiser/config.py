"""The configuration of a run, checked once, where it enters: each field is also an option of ``splitwiser run``."""

from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from splitwiser import constants
from splitwiser.data import DEFAULT_FINDING_COLUMN, DEFAULT_IMPRESSION_COLUMN
from splitwiser.errors import InputError, unknown
from splitwiser.request import SamplingParams

T = TypeVar("T")

OBJECTIVES = ("throughput", "ttft", "itl", "e2el")


def _option(default: T, help_text: str, kind: type = str) -> T:
    return field(default=default, metadata={"help": help_text, "type": kind})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What to run and how. Raises :class:`~splitwiser.errors.InputError` on values that make no sense together."""

    model: str = _option(constants.MODEL, "name of configs/models.yaml, checkpoint directory or hub id")
    case_id: int = _option(constants.CASE_ID, "prompting recipe of configs/cases.yaml", int)
    mode: str = _option(constants.MODE, "how the phases are placed: generate, sequential or mp")
    workers: str = _option(
        constants.WORKERS, "worker layout of mode mp: YAML file or text; empty: one prefill, one decode"
    )
    lend_cores: bool = _option(
        constants.LEND_CORES, "mode mp on a CPU: idle workers lend their cores, step by step", bool
    )
    data: str = _option(
        str(constants.DIR_DATA), "reports: directory of .tok sets, .jsonl, .csv or .parquet file, or a datasets name"
    )
    split: str = _option(constants.SPLIT, "which set of --data: train, validate or test")
    finding_column: str = _option(DEFAULT_FINDING_COLUMN, "column of --data that holds the text to summarise")
    impression_column: str = _option(
        DEFAULT_IMPRESSION_COLUMN, "column of --data that holds the reference summary, if any"
    )
    limit: int | None = _option(None, "only the first N requests", int)
    workload: str | None = _option(None, "JSON file of prompts and arrival times, instead of --data and --case_id")
    max_new_tokens: int | None = _option(None, "most new tokens a request, instead of the case's or workload's", int)
    temperature: float = _option(constants.TEMPERATURE, "0 is greedy; above, tokens are drawn at random", float)
    top_k: int = _option(constants.TOP_K, "draw among the K likeliest tokens; 0: all", int)
    top_p: float = _option(constants.TOP_P, "draw among the likeliest tokens of this total probability; 1: all", float)
    ignore_eos: bool = _option(False, "do not end a request at an end-of-sequence token", bool)
    seed: int = _option(constants.SEED, "of in-context examples, dummy weights and drawn tokens", int)
    dtype: str = _option(constants.DTYPE, "float32, bfloat16, float16, or auto: the checkpoint's own")
    device: str = _option(constants.DEVICE, "auto, cpu, cuda or cuda:N")
    gpu_id: int | None = _option(None, "the GPU to use, as the original's flag; the same as --device cuda:N", int)
    load_format: str = _option(constants.LOAD_FORMAT, "auto reads weights; dummy draws random ones, for timing")
    max_batch: int = _option(constants.MAX_BATCH, "most requests in one decode step", int)
    batch_size: int = _option(constants.BATCH_SIZE, "mode generate: rows of a padded batch", int)
    prefill_tokens: int = _option(constants.PREFILL_TOKENS, "most prompt tokens in one prefill step", int)
    kv_memory: str = _option(constants.KV_MEMORY, "size of the KV pool, such as 512MiB, or auto")
    kernels: str = _option(
        constants.KERNELS, "auto compiles what is faster so, where there is a compiler; plain does not"
    )
    results: str = _option(str(constants.DIR_RESULTS), "directory that gets a folder for this run")

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit must be 1 or more, not {self.limit}")
        _check_place(self)

    @property
    def device_name(self) -> str:
        """The device that ``device`` and ``gpu_id`` name together."""
        return _device_name(self)

    def sampling_params(self, max_new_tokens: int) -> SamplingParams:
        """Sampling parameters of every request; ``max_new_tokens`` is the case's or workload's."""
        return SamplingParams(
            max_tokens=max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            ignore_eos=self.ignore_eos,
        )


def _check_place(config: "RunConfig | ProfileConfig") -> None:
    """Check where a command is to run and to write."""
    if config.gpu_id is not None and config.device not in (constants.DEVICE, f"cuda:{config.gpu_id}"):
        raise InputError(f"--gpu_id {config.gpu_id} and --device {config.device} disagree; give one of them")
    if Path(config.results).exists() and not Path(config.results).is_dir():
        raise InputError(f"--results {config.results}: is a file; a directory is needed")


def _device_name(config: "RunConfig | ProfileConfig") -> str:
    return config.device if config.gpu_id is None else f"cuda:{config.gpu_id}"


def _as_in_run(name: str, default: object = None) -> Any:  # noqa: ANN401  # as dataclasses.field
    """The option ``name`` of ``splitwiser run``, with its default or another."""
    option = next(each for each in fields(RunConfig) if each.name == name)
    return field(default=option.default if default is None else default, metadata=option.metadata)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What to profile: each field is also an option of ``splitwiser profile``. Raises
    :class:`~splitwiser.errors.InputError` for a list that is none."""

    model: str = _as_in_run("model")
    prompt_lengths: str = _option("64,128,256,512,1024,2048", "prefill: tokens of a prompt, in a step of its own")
    prompts: str = _option("4", "prefill: also steps of so many prompts of each length, within --prefill_tokens")
    starts: str = _option("512", "prefill: also each length as a chunk behind so many tokens of its prompt")
    batch_sizes: str = _option("1,4,16,64", "decode: requests in a step")
    contexts: str = _option("128,512,2048", "decode: tokens that each request has in the pool")
    threads: str = _option("", "on a CPU: thread counts to profile with; empty: PyTorch's own")
    repeats: int = _option(5, "least number of measured steps a point; all together last 0.2 s at least", int)
    prefill_tokens: int = _as_in_run("prefill_tokens")
    dtype: str = _as_in_run("dtype")
    device: str = _as_in_run("device")
    gpu_id: int | None = _as_in_run("gpu_id")
    load_format: str = _as_in_run("load_format")
    kv_memory: str = _as_in_run("kv_memory")
    kernels: str = _as_in_run("kernels")
    seed: int = _as_in_run("seed")
    results: str = _as_in_run("results")

    def __post_init__(self) -> None:
        for name in ("prompt_lengths", "prompts", "starts", "batch_sizes", "contexts", "threads"):
            whole_numbers(name, getattr(self, name))
        for name in ("prompt_lengths", "batch_sizes", "contexts"):
            if not getattr(self, name).strip():
                raise InputError(f"--{name} is empty; at least one whole number is needed")
        for name in ("repeats", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be 1 or more, not {getattr(self, name)}")
        _check_place(self)

    @property
    def device_name(self) -> str:
        """The device that ``device`` and ``gpu_id`` name together."""
        return _device_name(self)


@dataclass(frozen=True, kw_only=True)
class AdviseConfig(RunConfig):
    """What to advise on: the options of a run, but for those that the advice is about, and these. Each is also an option of
    ``splitwiser advise``."""

    mode: str = constants.MODE  # no option, as the next two
    workers: str = constants.WORKERS
    batch_size: int = constants.BATCH_SIZE
    objective: str = _option("throughput", f"what is to be best: {', '.join(OBJECTIVES)}")
    profile: str | None = _option(
        None, "folder of an earlier advise: predict from what it measured, measure nothing anew"
    )
    checks: int = _option(3, "how many of the predicted placements to run, the best first; 0: none", int)
    repeats: int = _option(1, "how often to run each of them, in interleaved rounds", int)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        for name, least in (("checks", 0), ("repeats", 1), ("prefill_tokens", 1), ("max_batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} must be {least} or more, not {getattr(self, name)}")
        if self.profile is not None and not (Path(self.profile) / "profile.yaml").is_file():
            raise InputError(
                f"--profile {self.profile}: no profile.yaml in it; give the folder that an advise has made"
            )


def option_fields(kind: type[RunConfig] | type[ProfileConfig]) -> list[Field[Any]]:
    """The fields of ``kind`` that are options."""
    return [each for each in fields(kind) if each.metadata]


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of option ``name``, such as ``64,128``, ascending and each once. Raises :class:`InputError`."""
    numbers = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        if not part.isdecimal() or int(part) < 1:
            raise InputError(f"--{name} '{text}': '{part}' is not a whole number of 1 or more; write such as 64,128")
        numbers.add(int(part))
    return tuple(sorted(numbers))
