"""``splitwiser run``: runs a workload on an engine and writes a results folder."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from splitwiser.config import RunConfig
from splitwiser.engine.policy import READ_BY, describe_policy, reads
from splitwiser.engine.progress_bar import ProgressBar
from splitwiser.engine.schedule import describe_schedule
from splitwiser.files import Status, make_run_directory
from splitwiser.llm import LLM
from splitwiser.machine.describe import name_device, peak_memory_mb
from splitwiser.machine.load import measure_load
from splitwiser.machine.process import uninterrupted
from splitwiser.request import Request
from splitwiser.results.goodput import parse_goodput
from splitwiser.results.record import Record
from splitwiser.results.recorder import RunRecorder
from splitwiser.results.rouge import can_score
from splitwiser.workload.job import Job, prepare_job

NO_ROUGE = "no ROUGE against the references: rouge-score is not installed; pip install rouge-score"


@dataclass(frozen=True)
class RunResult:
    """A finished run: its results folder and its row of ``throughput.csv``."""

    directory: Path
    figures: dict[str, Any]


def run(config: RunConfig, job: Job | None = None) -> RunResult:
    """Run ``config`` and write its results folder; shows a progress bar. ``job`` are its requests, if they are planned
    already.

    Raises :class:`~splitwiser.errors.InputError` before a folder is created if the input is invalid. However the run ends
    later, its finished requests are in the folder, and ``run.yaml`` there says how it ended.
    """
    job = _note_unread(job or prepare_job(config, config.seed), config)
    before = measure_load()
    with LLM(config=config) as llm:
        reports = [each.report for each in job.requests]
        scored = llm.model.load_format == "auto" and any(report.impression for report in reports)
        for note in [*llm.model.notes, *job.notes, *([NO_ROUGE] if scored and not can_score() else [])]:
            tqdm.write(f"note: {note}")
        prompts = job.make_prompts(llm.model, config.seed)
        requests = llm.make_requests(
            prompts,
            job.sampling_params(config),
            job.arrival_s,
            job.adapters,
            priority=job.priority,
            ttft_target_ms=job.ttft_target_ms,
            predicted_tokens=job.predicted_tokens,
        )
        directory = make_run_directory(Path(config.results), llm.model.name, job.label, config.mode)
        recorder = RunRecorder(
            directory,
            Record(directory / "run.yaml", _record(config, llm, job, requests), llm.model.device),
            _labels(config, llm, directory.name),
            [reports[request.prompt_id] for request in requests],
            targets=None if config.goodput is None else parse_goodput(config.goodput),
            scored=scored and can_score(),
            before=before,
        )
        status: Status = "failed"
        error = None
        try:
            with uninterrupted(after=1):  # a second Ctrl-C waits until the results are written
                try:
                    with ProgressBar(recorder, requests, config.mode) as progress:
                        llm.run(requests, progress, recorder.begin(), config.max_concurrency)
                    status = "finished"
                except BaseException as fault:
                    status = "interrupted" if isinstance(fault, KeyboardInterrupt) else "failed"
                    error = f"{type(fault).__name__}: {fault}"
                    raise
                finally:
                    with uninterrupted():  # even the first one waits for this
                        recorder.end(status, error)
        finally:
            figures = recorder.finish(status, _memory(llm), error)
            if status != "finished":
                print(f"{status}; what was finished is in {directory}", file=sys.stderr)
    return RunResult(directory, figures)


def _note_unread(job: Job, config: RunConfig) -> Job:
    """Return ``job`` with a note of what its requests say for policies and the run's does not read, and of adapters that
    none of them has."""
    notes = [
        f"{name} of the requests changes nothing: it is for --policy {' or '.join(readers)}, and this is {config.policy}"
        for name, readers in READ_BY.items()
        if any(getattr(job, name)) and not reads(config.policy, name)
    ]
    used = {config.default_adapter if name is None else name for name in job.adapters}
    notes += [f"no request uses adapter {name}" for name in config.adapter_files if name not in used]
    return replace(job, notes=(*job.notes, *notes))


def _memory(llm: LLM) -> dict[str, float | None]:
    try:
        peak = peak_memory_mb(llm.model.device, llm.pids.values())
    except RuntimeError:  # after an error of the run, the GPU may not answer
        peak = None
    return {"peak_memory_mb": peak, "load_s": llm.model.load_s, "ready_s": llm.ready_s}


def _labels(config: RunConfig, llm: LLM, run_id: str) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "model": llm.model.name,
        "case_id": config.case_id if config.source == "case" else None,
        "backend": config.backend,
        "mode": config.mode,
        "workers": llm.workers,
        "device": name_device(llm.model.device),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "quantization": config.quantization,
        "kv_dtype": config.kv_dtype,
        "load_format": llm.model.load_format,
        "request_rate": config.request_rate,
        "burstiness": None if config.request_rate is None else config.burstiness,
        "max_concurrency": config.max_concurrency,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def _record(config: RunConfig, llm: LLM, job: Job, requests: Sequence[Request]) -> dict[str, Any]:
    pool = llm.started.pool
    new_tokens = [request.max_tokens for request in requests]
    return {
        "configuration": {
            **asdict(config),
            "device": str(llm.model.device),
            "max_new_tokens": max(new_tokens),
            "prefill_tokens": None if config.measures_budget else config.step_tokens,
        },
        "requests": {
            "source": config.source,
            "count": len(requests),
            "prompt_tokens": _spread([len(request.prompt_token_ids) for request in requests]),
            "max_new_tokens": _spread(new_tokens),
            "last_arrival_s": None if config.max_concurrency else max(request.arrival_s for request in requests),
            "notes": list(job.notes),
        },
        "model": {
            "name": llm.model.name,
            "class": type(llm.model.module).__name__,
            "parameters": llm.model.parameters,
            "dtype": str(llm.model.dtype).removeprefix("torch."),
            "load_format": llm.model.load_format,
            "notes": llm.model.notes,
        },
        "adapters": {name: str(files) for name, files in config.adapter_files.items()},
        "workers": llm.workers,
        "policy": None if config.layout is None else describe_policy(config.policy),
        "schedule": describe_schedule(config.schedule) if config.mixes else None,
        "mps": llm.started.mps,
        "backend": llm.started.backend,
        "kv_pool": pool
        and {
            "blocks": pool.blocks,
            "block_tokens": pool.block_tokens,
            "bytes": pool.nbytes,
            "reserve": config.reserve or llm.model.encodes,
            "prefix_caching": bool(config.prefix_caching) and not llm.model.encodes,
        },
        "division": llm.started.division,
        "kernels": llm.started.kernels,
        "load_s": llm.model.load_s,
        "ready_s": llm.ready_s,
    }
