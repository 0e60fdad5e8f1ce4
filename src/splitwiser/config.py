"""The configuration of a run, checked once, where it enters: each field is also an option of ``splitwiser run``."""

import math
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from splitwiser import constants
from splitwiser.errors import InputError, unknown
from splitwiser.request import SamplingParams
from splitwiser.results.goodput import parse_goodput
from splitwiser.results.schema import OBJECTIVES
from splitwiser.workload.reports import DEFAULT_FINDING_COLUMN, DEFAULT_IMPRESSION_COLUMN
from splitwiser.workload.synthetic import SPELLINGS, parse_lengths
from splitwiser.workload.trace import parse_slice

T = TypeVar("T")

MOST_REQUESTS = 10_000_000  # of synthetic ones, which all lie in memory at once


def _option(default: T, help_text: str, kind: type = str, *, group: str = "model and placement") -> T:
    return field(default=default, metadata={"help": help_text, "type": kind, "group": group})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What to run and how. Raises :class:`~splitwiser.errors.InputError` on values that make no sense together."""

    model: str = _option(constants.MODEL, "name of configs/models.yaml, checkpoint directory or hub id")
    case_id: int = _option(constants.CASE_ID, "prompting recipe of configs/cases.yaml", int, group="requests")
    mode: str = _option(constants.MODE, "how the phases are placed: generate, sequential, mp, mps or green")
    workers: str = _option(
        constants.WORKERS, "worker layout of modes mp, mps, green: YAML file or text; empty: one prefill, one decode"
    )
    share: str = _option(
        constants.SHARE,
        "how workers divide the device: fixed, by their shares; auto, by --itl_target_ms (mp on a CPU, green); none",
    )
    itl_target_ms: float = _option(constants.ITL_TARGET_MS, "share auto: what decode keeps between two tokens", float)
    lend: bool = _option(constants.LEND, "idle workers lend their part of the device, step by step", bool)
    decode_priority: bool = _option(
        constants.DECODE_PRIORITY, "on a GPU, decode's kernels go before prefill's (modes mps, green)", bool
    )
    mps: str = _option(
        constants.MPS, "mode mps: private starts an MPS daemon for this run; existing uses the one there"
    )
    exclusive: bool = _option(
        constants.EXCLUSIVE, "mode mps: GPU in compute mode EXCLUSIVE_PROCESS for this run; needs root", bool
    )
    data: str = _option(
        str(constants.DIR_DATA),
        "reports: directory of .tok sets, .jsonl, .csv or .parquet file, or a datasets name",
        group="requests",
    )
    split: str = _option(constants.SPLIT, "which set of --data: train, validate or test", group="requests")
    finding_column: str = _option(
        DEFAULT_FINDING_COLUMN, "column of --data that holds the text to summarise", group="requests"
    )
    impression_column: str = _option(
        DEFAULT_IMPRESSION_COLUMN, "column of --data that holds the reference summary, if any", group="requests"
    )
    workload: str | None = _option(
        None, "JSON file of prompts, lengths and arrival times, instead of --data and --case_id", group="requests"
    )
    trace: str | None = _option(
        None,
        "CSV of TIMESTAMP, ContextTokens, GeneratedTokens (the public Azure traces) to replay with random prompts of "
        "those lengths, instead of --data and --case_id",
        group="requests",
    )
    trace_slice: str | None = _option(
        None, "START:END, in seconds from the trace's first request: only what arrived then", group="requests"
    )
    trace_speed: float = _option(1.0, "replay the trace this many times as fast", float, group="requests")
    prompt_tokens: str | None = _option(
        None,
        f"random prompts of such lengths, instead of --data and --case_id, or of the trace's lengths: {SPELLINGS}",
        group="requests",
    )
    output_tokens: str | None = _option(
        None,
        "every request makes just so many tokens, past end-of-sequence ones; spelt as --prompt_tokens "
        f"(default with that: {constants.OUTPUT_TOKENS})",
        group="requests",
    )
    requests: int | None = _option(
        None, f"how many requests --prompt_tokens makes (default: {constants.REQUESTS})", int, group="requests"
    )
    limit: int | None = _option(None, "only the first N requests", int, group="requests")
    max_prompt_tokens: int | None = _option(
        None, "cut longer prompts of --trace or --prompt_tokens to this", int, group="requests"
    )
    max_new_tokens: int | None = _option(
        None,
        "most new tokens a request, instead of the case's or workload's; cuts the trace's and --output_tokens",
        int,
        group="requests",
    )
    request_rate: float | None = _option(
        None,
        "requests per second, instead of the workload's or trace's own times; inf, or without such times: all at once",
        float,
        group="arrivals",
    )
    burstiness: float = _option(
        1.0, "of --request_rate: 1 is Poisson, less is burstier, more is steadier, inf is even", float, group="arrivals"
    )
    max_concurrency: int | None = _option(
        None, "closed loop: N requests at a time, the next arrives the moment one finishes", int, group="arrivals"
    )
    goodput: str | None = _option(
        None, "targets in ms, such as ttft:200,tpot:50,e2el:5000: report the requests/s that meet all", group="results"
    )
    temperature: float = _option(
        constants.TEMPERATURE, "0 is greedy; above, tokens are drawn at random", float, group="sampling"
    )
    top_k: int = _option(constants.TOP_K, "draw among the K likeliest tokens; 0: all", int, group="sampling")
    top_p: float = _option(
        constants.TOP_P, "draw among the likeliest tokens of this total probability; 1: all", float, group="sampling"
    )
    ignore_eos: bool = _option(False, "do not end a request at an end-of-sequence token", bool, group="sampling")
    seed: int = _option(
        constants.SEED,
        "of in-context examples, lengths, arrivals, random prompts, dummy weights and drawn tokens",
        int,
        group="sampling",
    )
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
    results: str = _option(str(constants.DIR_RESULTS), "directory that gets a folder for this run", group="results")

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit must be 1 or more, not {self.limit}")
        _check_place(self)
        self._check_requests()
        self._check_arrivals()
        if self.goodput is not None:
            parse_goodput(self.goodput)

    def _check_requests(self) -> None:
        for name in ("requests", "max_prompt_tokens"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise InputError(f"--{name} must be 1 or more, not {given}")
        if self.requests is not None and self.requests > MOST_REQUESTS:
            raise InputError(f"--requests must be {MOST_REQUESTS:,} or less, not {self.requests:,}")
        for other in ("trace", "prompt_tokens"):
            if self.workload is not None and getattr(self, other) is not None:
                raise InputError(f"--workload and --{other} both say what the prompts are; give one of them")
        if self.trace is None and (self.trace_slice is not None or self.trace_speed != 1):
            raise InputError("--trace_slice and --trace_speed take a part of a trace; give its file with --trace")
        if not 0 < self.trace_speed < math.inf:
            raise InputError(f"--trace_speed must be above 0, not {self.trace_speed:g}")
        if self.requests is not None and self.source != "synthetic":
            raise InputError("--requests is for --prompt_tokens without --trace; --limit takes the first N of others")
        if self.max_prompt_tokens is not None and self.source not in ("trace", "synthetic"):
            raise InputError(
                "--max_prompt_tokens cuts the random prompts of --trace or --prompt_tokens; give one of them"
            )
        if self.trace_slice is not None:
            parse_slice(self.trace_slice)
        for name in ("prompt_tokens", "output_tokens"):
            if getattr(self, name) is not None:
                parse_lengths(f"--{name}", getattr(self, name))

    def _check_arrivals(self) -> None:
        if self.request_rate is not None and not self.request_rate > 0:
            raise InputError(f"--request_rate must be above 0 requests per second, not {self.request_rate:g}")
        if not self.burstiness > 0:
            raise InputError(f"--burstiness must be above 0, not {self.burstiness:g}")
        if self.burstiness != 1 and self.request_rate is None:
            raise InputError("--burstiness is of arrivals at a rate; give --request_rate")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise InputError(f"--max_concurrency must be 1 or more, not {self.max_concurrency}")
        if self.max_concurrency is not None and self.request_rate is not None:
            raise InputError(
                "--max_concurrency lets requests in as others finish, --request_rate at times; give one of them"
            )
        if self.trace_speed != 1 and (self.max_concurrency is not None or self.request_rate is not None):
            raise InputError(
                "--trace_speed is of the trace's own times, which --request_rate or --max_concurrency replaces"
            )

    @property
    def source(self) -> Literal["case", "workload", "trace", "synthetic"]:
        """Where the requests come from."""
        if self.workload is not None:
            return "workload"
        if self.trace is not None:
            return "trace"
        return "case" if self.prompt_tokens is None else "synthetic"

    @property
    def device_name(self) -> str:
        """The device that ``device`` and ``gpu_id`` name together."""
        return _device_name(self)

    def sampling_params(self, max_new_tokens: int, exact: bool = False) -> SamplingParams:
        """Sampling parameters of a request whose case, workload or trace says ``max_new_tokens``; if ``exact``, it makes
        just as many, whatever else."""
        return SamplingParams(
            max_tokens=max_new_tokens if exact or self.max_new_tokens is None else self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            ignore_eos=self.ignore_eos or exact,
        )


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What the doctor is asked about: a run's model, numbers, pool and device, whether to try the hub, and, by
    ``prompt_tokens``, whether the prompts are random ones instead of text."""

    model: str = constants.MODEL
    dtype: str = constants.DTYPE
    load_format: str = constants.LOAD_FORMAT
    kv_memory: str = constants.KV_MEMORY
    max_batch: int = constants.MAX_BATCH
    device: str = constants.DEVICE
    prompt_tokens: str | None = None
    hub: bool = False

    def __post_init__(self) -> None:
        if self.prompt_tokens is not None:
            parse_lengths("--prompt_tokens", self.prompt_tokens)
        if self.max_batch < 1:
            raise InputError(f"max_batch must be 1 or more, not {self.max_batch}")


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
    prompt_lengths: str = _option("64,128,256,512,1024,2048", "prefill: tokens of a prompt, a step each", group="steps")
    prompts: str = _option(
        "4", "prefill: also so many prompts of each length a step, within --prefill_tokens", group="steps"
    )
    starts: str = _option(
        "512", "prefill: also each length as a chunk behind so many tokens of its prompt", group="steps"
    )
    batch_sizes: str = _option("1,4,16,64", "decode: requests in a step", group="steps")
    contexts: str = _option("128,512,2048", "decode: tokens that each request has in the pool", group="steps")
    threads: str = _option("", "on a CPU: thread counts to profile with; empty: PyTorch's own", group="steps")
    repeats: int = _option(
        5, "least number of measured steps a point; all together last 0.2 s at least", int, group="steps"
    )
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

    mode: str = constants.MODE  # no option, as those up to batch_size
    workers: str = constants.WORKERS
    share: str = constants.SHARE
    itl_target_ms: float = constants.ITL_TARGET_MS
    batch_size: int = constants.BATCH_SIZE
    objective: str = _option("throughput", f"what is to be best: {', '.join(OBJECTIVES)}", group="advice")
    profile: str | None = _option(
        None, "folder of an earlier advise: predict from what it measured, measure nothing anew", group="advice"
    )
    checks: int = _option(
        3, "how many of the predicted placements to run, the best first; 0: none", int, group="advice"
    )
    repeats: int = _option(1, "how often to run each of them, in interleaved rounds", int, group="advice")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        if self.objective == "goodput" and self.goodput is None:
            raise InputError("--objective goodput needs targets; give --goodput, such as ttft:200,tpot:50")
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
