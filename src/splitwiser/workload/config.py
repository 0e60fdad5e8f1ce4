"""The configuration of a workload: where requests come from, when they arrive, and how their tokens are chosen."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from splitwiser import constants
from splitwiser.errors import InputError
from splitwiser.files import named_configs
from splitwiser.options import Options, check_counts, option, option_fields, typed_options
from splitwiser.request import SamplingParams
from splitwiser.workload.named import FOLDER, read_named_workload
from splitwiser.workload.reports import DEFAULT_FINDING_COLUMN, DEFAULT_IMPRESSION_COLUMN
from splitwiser.workload.synthetic import SPELLINGS, parse_lengths
from splitwiser.workload.trace import parse_slice

Source = Literal["case", "workload", "trace", "synthetic"]

PARAMETERS = (  # of sampling that are options for all requests
    "n", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "min_tokens", "ignore_eos", "stop", "stop_token_ids", "logprobs", "prompt_logprobs",
)  # fmt: skip
ENDS = ("min_tokens", "stop", "stop_token_ids")  # which say nothing where a request's number of tokens is fixed
MOST_REQUESTS = 10_000_000  # of synthetic requests, which are all in memory at once


@dataclass(frozen=True, kw_only=True, repr=False)
class WorkloadConfig(Options):
    """Which requests are made and when they arrive. Raises :class:`InputError` on values that make no sense together."""

    case_id: int = option(constants.CASE_ID, "prompting recipe of --cases", "requests")
    cases: str = option(str(constants.CASES), "YAML file of the prompting recipes", "requests")
    same_examples: bool = option(
        False,
        "draw a case's in-context examples once for all reports, not for each afresh, so that all prompts begin alike",
        "requests",
    )
    data: str = option(
        str(constants.DIR_DATA),
        "reports: directory of .tok sets, .jsonl, .csv or .parquet file, or a datasets name",
        "requests",
    )
    split: str = option(constants.SPLIT, "which set of --data: train, validate or test", "requests")
    finding_column: str = option(
        DEFAULT_FINDING_COLUMN, "column of --data that holds the text to summarise", "requests"
    )
    impression_column: str = option(
        DEFAULT_IMPRESSION_COLUMN, "column of --data that holds the reference summary, if any", "requests"
    )
    workload: str | None = option(
        None,
        "JSON file of prompts or chats, lengths and arrival times, .jsonl file of a request a line, or a name of "
        "configs/workloads, such as standard, instead of --data and --case_id",
        "requests",
    )
    trace: str | None = option(
        None,
        "CSV of TIMESTAMP, ContextTokens, GeneratedTokens (the public Azure traces) to replay with random prompts of "
        "those lengths, instead of --data and --case_id",
        "requests",
    )
    trace_slice: str | None = option(
        None, "START:END, in seconds from the trace's first request: only requests that arrived then", "requests"
    )
    trace_speed: float = option(1.0, "replay the trace this many times as fast", "requests")
    prompt_tokens: str | None = option(
        None,
        f"random prompts of these lengths, instead of --data and --case_id, or of the trace's lengths: {SPELLINGS}",
        "requests",
    )
    output_tokens: str | None = option(
        None,
        "every request generates exactly this many tokens, past end-of-sequence ones; format as --prompt_tokens "
        f"(default with that: {constants.OUTPUT_TOKENS})",
        "requests",
    )
    requests: int | None = option(
        None, f"number of requests that --prompt_tokens makes (default: {constants.REQUESTS})", "requests"
    )
    limit: int | None = option(None, "only the first N requests", "requests")
    chat_template: bool = option(
        False, "give each text prompt as a user's message, by the model's own chat template", "requests"
    )
    max_prompt_tokens: int | None = option(None, "cut longer prompts of --trace or --prompt_tokens to this", "requests")
    max_new_tokens: int | None = option(
        None,
        "most new tokens per request, instead of the case's or workload's; cuts the trace's and --output_tokens",
        "requests",
    )
    request_rate: float | None = option(
        None,
        "requests per second, instead of the workload's or trace's own times; inf, or without such times: all at once",
        "arrivals",
    )
    burstiness: float = option(
        1.0, "of --request_rate: 1 is Poisson, less is burstier, more is steadier, inf is even", "arrivals"
    )
    max_concurrency: int | None = option(
        None, "closed loop: N requests at a time, the next arrives when one finishes", "arrivals"
    )
    n: int = option(SamplingParams.n, "samples of each prompt, each a request of its own", "sampling")
    temperature: float = option(constants.TEMPERATURE, "0 is greedy; above, tokens are drawn at random", "sampling")
    top_k: int = option(constants.TOP_K, "draw among the K likeliest tokens; 0: all", "sampling")
    top_p: float = option(
        constants.TOP_P, "draw among the likeliest tokens of this total probability; 1: all", "sampling"
    )
    min_p: float = option(
        SamplingParams.min_p,
        "draw among tokens at least this many times as likely as the likeliest; 0: all",
        "sampling",
    )
    repetition_penalty: float = option(
        SamplingParams.repetition_penalty, "above 1, tokens of the prompt and the output become less likely", "sampling"
    )
    presence_penalty: float = option(
        SamplingParams.presence_penalty, "is taken from the logit of every token of the output", "sampling"
    )
    frequency_penalty: float = option(
        SamplingParams.frequency_penalty,
        "is taken from a token's logit once for each time that it is in the output",
        "sampling",
    )
    logit_bias: str | None = option(
        None, "is added to logits, from -100 to 100 by token id, as JSON: '{\"2\": -100}'", "sampling"
    )
    min_tokens: int = option(
        SamplingParams.min_tokens, "no token or text ends a request that has fewer new tokens", "sampling"
    )
    ignore_eos: bool = option(False, "do not end a request at an end-of-sequence token", "sampling")
    stop: str | None = option(
        None, 'a text that ends a request and is cut off; several as a JSON list: \'["\\n\\n", "###"]\'', "sampling"
    )
    stop_token_ids: str | None = option(
        None, "a token id that ends a request, beside the model's own; several as a JSON list: [13, 198]", "sampling"
    )
    logprobs: int | None = option(
        SamplingParams.logprobs,
        "write log-probabilities of each new token and of this many of the likeliest, up to 20, to tokens.csv",
        "sampling",
    )
    prompt_logprobs: int | None = option(
        SamplingParams.prompt_logprobs, "as --logprobs, of the prompt's tokens after the first", "sampling"
    )

    def __post_init__(self) -> None:
        if self.workload is not None:
            self._check_workload()
        check_counts(self, "limit", "requests", "max_prompt_tokens", "max_new_tokens")
        self.sampling_params(max(1, self.min_tokens))  # raises for invalid ones
        self._check_requests()
        self._check_texts()
        self._check_arrivals()
        if self.trace_slice is not None:
            parse_slice(self.trace_slice)
        for name in ("prompt_tokens", "output_tokens"):
            if getattr(self, name) is not None:
                parse_lengths(f"--{name}", getattr(self, name))

    def _check_workload(self) -> None:
        """Set the options of a named workload that were not given explicitly."""
        is_named = self.workload in named_configs(FOLDER)
        for other in ("trace",) if is_named else ("trace", "prompt_tokens"):
            if getattr(self, other) is not None:
                raise InputError(f"--workload and --{other} both set the prompts; give one of them")
        if not is_named:
            return
        try:
            options = typed_options(read_named_workload(str(self.workload)), WorkloadConfig)
        except InputError as error:
            raise InputError(f"--workload {self.workload}: {error}") from error
        for name, value in options.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _check_requests(self) -> None:
        if self.requests is not None and self.requests > MOST_REQUESTS:
            raise InputError(f"--requests must be {MOST_REQUESTS:,} or less, not {self.requests:,}")
        if self.same_examples and self.source != "case":
            raise InputError("--same_examples is for cases with in-context examples; give --case_id alone")
        if self.trace is None and (self.trace_slice is not None or self.trace_speed != 1):
            raise InputError("--trace_slice and --trace_speed apply to a trace; give its file with --trace")
        if not 0 < self.trace_speed < math.inf:
            raise InputError(f"--trace_speed must be above 0, not {self.trace_speed:g}")
        if self.requests is not None and self.source != "synthetic":
            raise InputError("--requests is for --prompt_tokens without --trace; --limit takes the first N of others")
        if self.max_prompt_tokens is not None and self.source not in ("trace", "synthetic"):
            raise InputError(
                "--max_prompt_tokens cuts the random prompts of --trace or --prompt_tokens; give one of them"
            )

    def _check_texts(self) -> None:
        """Refuse options for texts where prompts are random, or where the length of answers is fixed."""
        is_random = self.source in ("trace", "synthetic")
        if self.chat_template and is_random:
            raise InputError(
                "--chat_template is for prompts of text, and those of --trace and --prompt_tokens are random"
            )
        for name in ENDS if is_random or self.output_tokens is not None else ():
            if getattr(self, name) != option_fields(WorkloadConfig)[name].default:
                raise InputError(
                    f"--{name} changes when a request ends, and --trace, --prompt_tokens and --output_tokens fix how many "
                    "tokens it has"
                )

    def _check_arrivals(self) -> None:
        if self.request_rate is not None and not self.request_rate > 0:
            raise InputError(f"--request_rate must be above 0 requests per second, not {self.request_rate:g}")
        if not self.burstiness > 0:
            raise InputError(f"--burstiness must be above 0, not {self.burstiness:g}")
        if self.burstiness != 1 and self.request_rate is None:
            raise InputError("--burstiness applies to arrivals at a rate; give --request_rate")
        check_counts(self, "max_concurrency")
        if self.max_concurrency is not None and self.request_rate is not None:
            raise InputError(
                "--max_concurrency admits requests as others finish, --request_rate at given times; give one of them"
            )
        if self.trace_speed != 1 and (self.max_concurrency is not None or self.request_rate is not None):
            raise InputError(
                "--trace_speed applies to the trace's own times, which --request_rate or --max_concurrency replaces"
            )

    @property
    def source(self) -> Source:
        """Source of the requests; a named workload is synthetic."""
        if self.workload is not None and self.prompt_tokens is None:
            return "workload"
        if self.trace is not None:
            return "trace"
        return "case" if self.prompt_tokens is None else "synthetic"

    def sampling_params(
        self, max_new_tokens: int, exact: bool = False, own: Mapping[str, Any] = MappingProxyType({})
    ) -> SamplingParams:
        """Return the sampling parameters of a request whose case, workload or trace says ``max_new_tokens``, and which has
        parameters of its ``own``, by name. If ``exact``, it generates exactly that many, past end-of-sequence tokens and
        regardless of ``--max_new_tokens``."""
        params = {name: getattr(self, name) for name in PARAMETERS}
        params |= {name: parse(params[name]) for name, parse in _PARSERS.items()} | dict(own)
        if exact:
            params["ignore_eos"] = True
        most = max_new_tokens if exact or self.max_new_tokens is None else self.max_new_tokens
        return SamplingParams(max_tokens=most, **params)


def parse_stop(given: str | None) -> Sequence[str]:
    """Return the stop strings that are ``given``: a JSON list of texts, or one text."""
    if given is None:
        return ()
    listed = _parse_json(given)
    is_list = isinstance(listed, list) and all(isinstance(each, str) for each in listed)
    return listed if is_list else (given,)


def _parse_json(given: str | None) -> Any:  # noqa: ANN401  # whatever a user gives; SamplingParams checks it
    """Return ``given`` as JSON, or as it is if it is none."""
    try:
        return given if given is None else json.loads(given)
    except ValueError:
        return given


_PARSERS: Mapping[str, Callable[[str | None], Any]] = {
    "stop": parse_stop, "stop_token_ids": _parse_json, "logit_bias": _parse_json
}  # fmt: skip
