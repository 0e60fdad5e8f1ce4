"""Plans the requests of a run: prompts of a case, workload file or trace, or random ones, with lengths and arrival times."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from splitwiser import constants
from splitwiser.errors import InputError
from splitwiser.files import find_config
from splitwiser.options import option_fields
from splitwiser.request import PromptInput, SamplingParams
from splitwiser.workload.arrivals import check_arrival, gamma_arrivals
from splitwiser.workload.cases import get_case
from splitwiser.workload.config import ENDS, PARAMETERS, Source, WorkloadConfig
from splitwiser.workload.named import FOLDER
from splitwiser.workload.planned import PlannedRequest
from splitwiser.workload.prompt_file import read_prompt_file
from splitwiser.workload.reports import load_reports, load_tok
from splitwiser.workload.request_entry import read_request_lines
from splitwiser.workload.synthetic import parse_lengths, random_prompts
from splitwiser.workload.trace import parse_slice, read_trace


class ModelFacts(Protocol):
    """The properties of a model that random prompts depend on."""

    name: str
    max_positions: int | None

    def positions_needed(self, prompt_tokens: int, new_tokens: int) -> int:
        """Return how many positions a request takes."""
        ...

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads the prompts."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        ...

    @property
    def special_token_ids(self) -> Collection[int]:
        """Token ids that do not represent text."""
        ...


Reader = Callable[[Path], list[PlannedRequest]]
"""Reads the requests of a file, one or more. Raises :class:`InputError` naming the file."""

READERS: dict[str, Reader] = {
    ".json": read_prompt_file,
    ".jsonl": read_request_lines,
}
"""The formats of ``--workload`` files, by their ending; another ending is read as JSON. A new format is a row here and a
module with its reader."""


@dataclass(frozen=True)
class Job:
    """The requests of a run. ``label`` names them in folders. ``exact`` says that every request generates exactly
    its ``new_tokens``, past end-of-sequence tokens."""

    label: str
    requests: Sequence[PlannedRequest]
    exact: bool = False
    notes: tuple[str, ...] = ()

    def make_prompts(self, model: ModelFacts, seed: int) -> list[PromptInput]:
        """Return the prompts, drawn for ``model`` where they are random. Raises :class:`InputError` for one that is too
        long."""
        prompts = [each.prompt_for(model.encodes) for each in self.requests]
        given = [prompt for prompt in prompts if prompt is not None]
        if given:
            return given
        for number, each in enumerate(self.requests):
            needed = model.positions_needed(each.prompt_tokens, each.new_tokens)
            if model.max_positions is not None and needed > model.max_positions:
                raise InputError(
                    f"request {number}: {each.prompt_tokens} prompt tokens and {each.new_tokens} new ones need {needed} "
                    f"positions, and {model.name} has {model.max_positions}; cut them with --max_prompt_tokens and "
                    "--max_new_tokens"
                )
        lengths = [each.prompt_tokens for each in self.requests]
        drawn = random_prompts(lengths, model.vocabulary, model.special_token_ids, _generator(seed, "prompts"))
        return list(drawn)

    def sampling_params(self, config: WorkloadConfig) -> list[SamplingParams]:
        """Return the sampling parameters of each request."""
        return [config.sampling_params(each.new_tokens, self.exact, each.sampling) for each in self.requests]

    @property
    def adapters(self) -> list[str | None]:
        """The name of each request's adapter, None for the run's default."""
        return [each.adapter for each in self.requests]

    @property
    def arrival_s(self) -> list[float]:
        """When each request arrives, in seconds from the start."""
        return [each.arrival_s for each in self.requests]

    @property
    def priority(self) -> list[int]:
        """The priority of each request; the lowest goes first."""
        return [each.priority for each in self.requests]

    @property
    def ttft_target_ms(self) -> list[float | None]:
        """The TTFT that each request is to have, in milliseconds; None for one without a target of its own."""
        return [each.ttft_target_ms for each in self.requests]

    @property
    def predicted_tokens(self) -> list[int | None]:
        """How many new tokens each request is predicted to come to; None for one without a prediction."""
        return [each.predicted_tokens for each in self.requests]


def prepare_job(config: WorkloadConfig, seed: int) -> Job:
    """Return the requests that ``config`` asks for, with all that is random drawn by ``seed``. Raises
    :class:`InputError`."""
    job = _SOURCES[config.source](config, seed)
    count = len(job.requests)
    if config.chat_template:
        chats = [_as_chat(each.prompt, number) for number, each in enumerate(job.requests)]
        job = _changed(_changed(job, "prompt", chats), "source", [None] * count)
    job = _note_own_parameters(job, config)
    if config.output_tokens is not None:
        lengths = parse_lengths("--output_tokens", config.output_tokens).draw(count, _generator(seed, "output lengths"))
        job = replace(_changed(job, "new_tokens", lengths), exact=True)
    if config.prompt_tokens is not None:
        lengths = parse_lengths("--prompt_tokens", config.prompt_tokens).draw(count, _generator(seed, "prompt lengths"))
        job = _changed(job, "prompt_tokens", lengths)
    if config.request_rate is not None:
        times = gamma_arrivals(count, config.request_rate, config.burstiness, _generator(seed, "arrivals"))
        job = _changed(job, "arrival_s", times)
    if config.max_concurrency is None:
        for number, each in enumerate(job.requests):
            check_arrival(each.arrival_s, f"request {number}")
    if config.source in ("trace", "synthetic"):
        job = _cut(job, "prompt_tokens", config.max_prompt_tokens, "prompt tokens")
    return _cut(job, "new_tokens", config.max_new_tokens, "new tokens") if job.exact else job


def _from_case(config: WorkloadConfig, seed: int) -> Job:
    case = get_case(Path(config.cases), config.case_id)
    reports = load_reports(config.data, config.split, config.finding_column, config.impression_column)[: config.limit]
    training = load_tok(constants.DIR_DATA, "train") if case.examples else []
    prompts, sources = (
        each.prompts(reports, training, seed, same=config.same_examples) for each in (case, case.for_encoder)
    )
    requests = [
        PlannedRequest(prompt, 0, case.max_new_tokens, report=report, source=source)
        for report, prompt, source in zip(reports, prompts, sources, strict=True)
    ]
    return Job(f"case{case.case_id}", requests)


def _from_workload(config: WorkloadConfig, _: int) -> Job:
    path = find_config(FOLDER, str(config.workload), "--workload")
    requests = READERS.get(path.suffix, read_prompt_file)(path)[: config.limit]
    return Job(path.stem, requests, exact=all(each.prompt is None for each in requests))


def _from_trace(config: WorkloadConfig, _: int) -> Job:
    path = Path(str(config.trace))
    requests = read_trace(path, *parse_slice(config.trace_slice or ":"), config.trace_speed)
    return Job(path.stem, requests[: config.limit], exact=True)


def _from_lengths(config: WorkloadConfig, _: int) -> Job:
    """Return requests whose prompt lengths are drawn later, and the answers' lengths too if they are given."""
    count = constants.REQUESTS if config.requests is None else config.requests
    count = min(count, config.limit or count)
    new_tokens = constants.OUTPUT_TOKENS if config.max_new_tokens is None else config.max_new_tokens
    return Job(config.workload or "synthetic", [PlannedRequest(None, 0, new_tokens)] * count, exact=True)


_SOURCES: dict[Source, Callable[[WorkloadConfig, int], Job]] = {
    "case": _from_case,
    "workload": _from_workload,
    "trace": _from_trace,
    "synthetic": _from_lengths,
}


def _as_chat(prompt: PromptInput | None, number: int) -> PromptInput:
    """Return the text ``prompt`` as a user's message; a chat stays as it is. Raises :class:`InputError` for token ids."""
    if isinstance(prompt, str):
        return {"messages": [{"role": "user", "content": prompt}]}
    if isinstance(prompt, Mapping):
        return prompt
    raise InputError(f"request {number}: its prompt is token ids, and --chat_template is for text")


def _note_own_parameters(job: Job, config: WorkloadConfig) -> Job:
    """Return ``job`` with a note of each sampling option that was given and is not used, since requests have their own.
    Raises :class:`InputError` for a request that says when it ends and whose number of tokens is fixed."""
    notes = list(job.notes)
    own = [(number, each.sampling) for number, each in enumerate(job.requests) if each.sampling]
    for name in PARAMETERS:
        count = sum(name in sampling for _, sampling in own)
        if count and getattr(config, name) != option_fields(WorkloadConfig)[name].default:
            notes.append(f"{name} is as the workload says for {count} of {len(job.requests)} requests")
    for number, sampling in own:
        ends = [name for name in ENDS if sampling.get(name)]
        if config.output_tokens is not None and ends:
            raise InputError(
                f"request {number}: {ends[0]} changes when it ends, and --output_tokens fixes how many tokens it has"
            )
    return replace(job, notes=tuple(notes))


def _changed(job: Job, name: str, values: Sequence[object]) -> Job:
    """Return ``job`` with the field ``name`` of each request replaced by its value."""
    changes: list[dict[str, Any]] = [{name: value} for value in values]
    return replace(job, requests=[replace(each, **change) for each, change in zip(job.requests, changes, strict=True)])


def _cut(job: Job, name: str, most: int | None, what: str) -> Job:
    """Return ``job`` with the lengths ``name`` cut to ``most``, and a note of how many were longer."""
    lengths = [getattr(each, name) for each in job.requests]
    over = sum(length > most for length in lengths) if most is not None else 0
    if most is None or not over:
        return job
    note = f"{over} of {len(lengths)} requests are cut to {most} {what}"
    return replace(_changed(job, name, [min(length, most) for length in lengths]), notes=(*job.notes, note))


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """Return a random generator for one purpose, so that the draws for one purpose do not affect another."""
    return np.random.default_rng([seed & (2**64 - 1), *purpose.encode()])
