"""The configuration of a run, checked once, where it enters: each field is also an option of ``splitwiser run``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from splitwiser import constants
from splitwiser.data import DEFAULT_FINDING_COLUMN, DEFAULT_IMPRESSION_COLUMN
from splitwiser.errors import InputError
from splitwiser.request import SamplingParams

T = TypeVar("T")


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
        if self.gpu_id is not None and self.device not in (constants.DEVICE, f"cuda:{self.gpu_id}"):
            raise InputError(f"--gpu_id {self.gpu_id} and --device {self.device} disagree; give one of them")
        if Path(self.results).exists() and not Path(self.results).is_dir():
            raise InputError(f"--results {self.results}: is a file; a directory is needed")

    @property
    def device_name(self) -> str:
        """The device that ``device`` and ``gpu_id`` name together."""
        return self.device if self.gpu_id is None else f"cuda:{self.gpu_id}"

    def sampling_params(self, max_new_tokens: int) -> SamplingParams:
        """Sampling parameters of every request; ``max_new_tokens`` is the case's or workload's."""
        return SamplingParams(
            max_tokens=max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            ignore_eos=self.ignore_eos,
        )


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What the doctor is asked about: a run's model, numbers, pool and device, and whether to try the hub."""

    model: str = constants.MODEL
    dtype: str = constants.DTYPE
    load_format: str = constants.LOAD_FORMAT
    kv_memory: str = constants.KV_MEMORY
    max_batch: int = constants.MAX_BATCH
    device: str = constants.DEVICE
    hub: bool = False

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise InputError(f"max_batch must be 1 or more, not {self.max_batch}")
