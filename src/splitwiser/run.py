"""The main job: prompts from a case or a workload, through an engine, into a folder of results."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from splitwiser import constants
from splitwiser.cases import get_case
from splitwiser.config import RunConfig
from splitwiser.data import Report, load_reports, load_tok
from splitwiser.engine import Observer
from splitwiser.llm import LLM, Prompt, check_sizes, plan_workers
from splitwiser.machine import describe_machine, describe_versions, git_commit, peak_memory_mb
from splitwiser.messages import StepRecord
from splitwiser.model import plan_model
from splitwiser.request import Request, RequestOutput
from splitwiser.results import RunRecorder, Status, make_run_directory
from splitwiser.workload import load_workload


@dataclass(frozen=True)
class Job:
    """What a run asks for: a prompt and a report (finding and reference) each request, and when they arrive."""

    label: str
    prompts: Sequence[Prompt]
    reports: Sequence[Report]
    max_new_tokens: int
    arrival_s: Sequence[float]


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and its row of ``throughput.csv``."""

    directory: Path
    figures: dict[str, Any]


def prepare_job(config: RunConfig) -> Job:
    """The prompts of ``config``'s workload file, or of its case over its data."""
    if config.workload is not None:
        workload = load_workload(Path(config.workload))
        prompts = workload.prompts[: config.limit]
        reports = [Report(prompt if isinstance(prompt, str) else "") for prompt in prompts]
        label = Path(config.workload).stem
        return Job(label, prompts, reports, workload.max_new_tokens, workload.arrival_s[: config.limit])
    case = get_case(constants.DIR_CONFIGS / "cases.yaml", config.case_id)
    reports = load_reports(config.data, config.split, config.finding_column, config.impression_column)[: config.limit]
    training = load_tok(constants.DIR_DATA, "train") if case.examples else []
    texts = case.prompts(reports, training, config.seed)
    return Job(f"case{case.case_id}", texts, reports, case.max_new_tokens, [0.0] * len(texts))


def check(config: RunConfig) -> Job:
    """What ``config`` asks for, if all is right that can be known without loading the model.

    Raises :class:`~splitwiser.errors.InputError` as :func:`run` would, for commands that start many runs.
    """
    plan_workers(config.mode, config.workers)
    check_sizes(
        config.kv_memory,
        max_batch=config.max_batch,
        batch_size=config.batch_size,
        prefill_tokens=config.prefill_tokens,
    )
    plan_model(config.model, dtype=config.dtype, device=config.device_name, load_format=config.load_format)
    job = prepare_job(config)
    config.sampling_params(job.max_new_tokens)
    return job


def run(config: RunConfig) -> RunResult:
    """Run ``config`` and write its results folder; shows a progress bar.

    Raises :class:`~splitwiser.errors.InputError` before a folder is made if the input is wrong. Whatever ends the run
    later, what was finished is in the folder, and its ``run.yaml`` says how the run ended.
    """
    job = prepare_job(config)
    with LLM(
        config.model,
        mode=config.mode,
        workers=config.workers,
        lend_cores=config.lend_cores,
        dtype=config.dtype,
        device=config.device_name,
        load_format=config.load_format,
        kv_memory=config.kv_memory,
        max_batch=config.max_batch,
        batch_size=config.batch_size,
        prefill_tokens=config.prefill_tokens,
        kernels=config.kernels,
        seed=config.seed,
    ) as llm:
        for note in llm.model.notes:
            tqdm.write(f"note: {note}")
        requests = llm.make_requests(job.prompts, config.sampling_params(job.max_new_tokens), job.arrival_s)
        directory = make_run_directory(Path(config.results), llm.model.name, job.label, config.mode)
        record = _record(config, llm, requests[0].params.max_tokens)
        recorder = RunRecorder(directory, record, _labels(config, llm, directory.name), job.reports)
        status: Status = "failed"
        error = None
        try:
            with _Progress(recorder, requests, config.mode) as progress:
                llm.run(requests, progress, recorder.begin())
            status = "finished"
        except BaseException as fault:
            status = "interrupted" if isinstance(fault, KeyboardInterrupt) else "failed"
            error = f"{type(fault).__name__}: {fault}"
            raise
        finally:
            memory = {
                "peak_memory_mb": peak_memory_mb(llm.model.device, llm.pids.values()),
                "load_s": llm.model.load_s,
                "ready_s": llm.ready_s,
            }
            figures = recorder.finish(status, memory, error)
            if status != "finished":
                print(f"{status}; what was finished is in {directory}", file=sys.stderr)
    return RunResult(directory, figures)


class _Progress(Observer):
    """Passes on what it is told and shows a bar of how much of all tokens that may come has come."""

    def __init__(self, observer: Observer, requests: Sequence[Request], description: str) -> None:
        self._observer = observer
        self._finished = 0
        self._requests = len(requests)
        self._most = {request.request_id: request.params.max_tokens for request in requests}
        self._tokens = 0
        self._bar = tqdm(
            total=sum(self._most.values()),
            desc=description,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            mininterval=0.1 if sys.stderr.isatty() else 5,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._show(0)
        self._bar.close()

    def on_step(self, record: StepRecord) -> None:
        self._observer.on_step(record)
        if record.phase == "decode":
            self._tokens += record.tokens
            self._show(record.tokens)

    def on_output(self, output: RequestOutput) -> None:
        self._observer.on_output(output)
        self._finished += 1
        self._tokens += 1  # the one that prefill drew
        self._show(self._most[output.request_id] - len(output.token_ids) + 1)

    def _show(self, tokens: int) -> None:
        self._bar.set_postfix_str(f"{self._finished}/{self._requests} requests, {self._tokens:,} tokens", refresh=False)
        self._bar.update(tokens)


def _labels(config: RunConfig, llm: LLM, run_id: str) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "model": llm.model.name,
        "case_id": config.case_id if config.workload is None else None,
        "mode": config.mode,
        "workers": llm.workers,
        "device": str(llm.model.device),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "load_format": llm.model.load_format,
    }


def _record(config: RunConfig, llm: LLM, max_new_tokens: int) -> dict[str, Any]:
    pool = llm.pool
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "configuration": {**asdict(config), "device": str(llm.model.device), "max_new_tokens": max_new_tokens},
        "model": {
            "name": llm.model.name,
            "class": type(llm.model.module).__name__,
            "parameters": llm.model.parameters,
            "dtype": str(llm.model.dtype).removeprefix("torch."),
            "load_format": llm.model.load_format,
            "notes": llm.model.notes,
        },
        "workers": llm.workers,
        "kv_pool": pool and {"blocks": pool.blocks, "block_tokens": pool.block_tokens, "bytes": pool.nbytes},
        "kernels": {
            "prefill_attention": "torch.nn.functional.scaled_dot_product_attention" if pool else llm.kernels,
            "decode_attention": llm.kernels,
        },
        "load_s": llm.model.load_s,
        "ready_s": llm.ready_s,
        "machine": describe_machine(llm.model.device),
        "versions": describe_versions(),
    }
