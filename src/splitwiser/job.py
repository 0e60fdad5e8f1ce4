"""What a run asks for: prompts from a case, a workload file, a trace or thin air, with their lengths and arrival times."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from splitwiser import constants
from splitwiser.config import RunConfig
from splitwiser.errors import InputError
from splitwiser.llm import Prompt, check_mode_here, check_mps, check_sizes, plan_workers
from splitwiser.model.loading import LoadedModel, plan_model
from splitwiser.placement.shares import ShareSettings
from splitwiser.request import SamplingParams
from splitwiser.workload.arrivals import check_arrival, gamma_arrivals
from splitwiser.workload.cases import get_case
from splitwiser.workload.prompt_file import load_workload
from splitwiser.workload.reports import Report, load_reports, load_tok
from splitwiser.workload.synthetic import parse_lengths, random_prompts
from splitwiser.workload.trace import load_trace, parse_slice


@dataclass(frozen=True)
class Job:
    """The requests of a run: a report (finding and reference), the tokens to make and when it arrives, each.

    ``prompts`` is None where the prompts are synthetic: ``prompt_tokens`` are their lengths. ``exact`` says that every
    request makes just its ``new_tokens``, whatever end-of-sequence tokens come; else they are the most.
    """

    label: str
    reports: Sequence[Report]
    prompts: Sequence[Prompt] | None
    prompt_tokens: Sequence[int]
    new_tokens: Sequence[int]
    arrival_s: Sequence[float]
    exact: bool = False
    notes: tuple[str, ...] = ()

    def make_prompts(self, model: LoadedModel, seed: int) -> Sequence[Prompt]:
        """The prompts, for ``model`` where they are synthetic. Raises :class:`InputError` for one that is too long."""
        if self.prompts is not None:
            return self.prompts
        for number, (prompt, new) in enumerate(zip(self.prompt_tokens, self.new_tokens, strict=True)):
            if model.max_positions is not None and prompt + new - 1 > model.max_positions:
                raise InputError(
                    f"request {number}: {prompt} prompt tokens and {new} new ones need {prompt + new - 1} positions, and "
                    f"{model.name} has {model.max_positions}; cut them with --max_prompt_tokens and --max_new_tokens"
                )
        return random_prompts(
            self.prompt_tokens, model.vocabulary, model.special_token_ids, _generator(seed, "prompts")
        )

    def sampling_params(self, config: RunConfig) -> list[SamplingParams]:
        """Each request's."""
        return [config.sampling_params(new, self.exact) for new in self.new_tokens]


def prepare_job(config: RunConfig) -> Job:
    """The requests that ``config`` asks for. Raises :class:`InputError`."""
    match config.source:
        case "workload":
            job = _from_workload(config)
        case "trace":
            job = _from_trace(config)
        case "synthetic":
            job = _from_nothing(config)
        case "case":
            job = _from_case(config)
    count = len(job.reports)
    if config.output_tokens is not None:
        lengths = parse_lengths("--output_tokens", config.output_tokens)
        job = replace(job, new_tokens=lengths.draw(count, _generator(config.seed, "output lengths")), exact=True)
    if config.prompt_tokens is not None:
        lengths = parse_lengths("--prompt_tokens", config.prompt_tokens)
        job = replace(job, prompt_tokens=lengths.draw(count, _generator(config.seed, "prompt lengths")))
    if config.request_rate is not None:
        times = gamma_arrivals(count, config.request_rate, config.burstiness, _generator(config.seed, "arrivals"))
        job = replace(job, arrival_s=times)
    if config.max_concurrency is None:
        for number, arrival_s in enumerate(job.arrival_s):
            check_arrival(arrival_s, f"request {number}")
    return _cut(job, config)


def _from_case(config: RunConfig) -> Job:
    case = get_case(constants.DIR_CONFIGS / "cases.yaml", config.case_id)
    reports = load_reports(config.data, config.split, config.finding_column, config.impression_column)[: config.limit]
    training = load_tok(constants.DIR_DATA, "train") if case.examples else []
    texts = case.prompts(reports, training, config.seed)
    count = len(texts)
    return Job(f"case{case.case_id}", reports, texts, (), [case.max_new_tokens] * count, [0.0] * count)


def _from_workload(config: RunConfig) -> Job:
    path = Path(str(config.workload))
    workload = load_workload(path)
    kept = slice(config.limit)
    prompts = workload.prompts[kept]
    reports = [Report(prompt if isinstance(prompt, str) else "") for prompt in prompts]
    return Job(path.stem, reports, prompts, (), workload.max_new_tokens[kept], workload.arrival_s[kept])


def _from_trace(config: RunConfig) -> Job:
    path = Path(str(config.trace))
    start_s, end_s = parse_slice(config.trace_slice or ":")
    trace = load_trace(path, start_s, end_s, config.trace_speed)
    kept = slice(config.limit)
    arrival_s = trace.arrival_s[kept]
    reports = [Report("")] * len(arrival_s)
    return Job(path.stem, reports, None, trace.prompt_tokens[kept], trace.output_tokens[kept], arrival_s, exact=True)


def _from_nothing(config: RunConfig) -> Job:
    """Prompts of lengths that are drawn later, and the answers' lengths unless those are drawn, too."""
    count = constants.REQUESTS if config.requests is None else config.requests
    count = min(count, config.limit or count)
    new_tokens = [constants.OUTPUT_TOKENS if config.max_new_tokens is None else config.max_new_tokens] * count
    return Job("synthetic", [Report("")] * count, None, (), new_tokens, [0.0] * count, exact=True)


def _cut(job: Job, config: RunConfig) -> Job:
    """``job`` with synthetic prompts and exact answers no longer than the options allow, and notes of how many were."""
    prompt_tokens, of_prompts = _at_most(config.max_prompt_tokens, job.prompt_tokens, "prompt tokens")
    new_tokens, of_answers = _at_most(config.max_new_tokens if job.exact else None, job.new_tokens, "new tokens")
    return replace(job, prompt_tokens=prompt_tokens, new_tokens=new_tokens, notes=of_prompts + of_answers)


def _at_most(most: int | None, lengths: Sequence[int], what: str) -> tuple[Sequence[int], tuple[str, ...]]:
    over = sum(length > most for length in lengths) if most is not None else 0
    if most is None or not over:
        return lengths, ()
    return [min(length, most) for length in lengths], (f"{over} of {len(lengths)} requests are cut to {most} {what}",)


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose: more or other draws for one change nothing in another."""
    return np.random.default_rng([seed & (2**64 - 1), *purpose.encode()])


def check(config: RunConfig) -> Job:
    """What ``config`` asks for, if all is right that can be known without loading the model.

    Raises :class:`~splitwiser.errors.InputError` as :func:`splitwiser.run.run` would, for commands that start many runs.
    """
    shares = ShareSettings(config.share, config.itl_target_ms, config.lend, config.decode_priority)
    plan_workers(config.mode, config.workers, shares)
    check_mps(config.mode, config.mps, config.exclusive)
    check_mode_here(config.mode, config.device_name)
    check_sizes(
        config.kv_memory,
        max_batch=config.max_batch,
        batch_size=config.batch_size,
        prefill_tokens=config.prefill_tokens,
    )
    plan_model(config.model, dtype=config.dtype, device=config.device_name, load_format=config.load_format)
    job = prepare_job(config)
    job.sampling_params(config)
    return job
