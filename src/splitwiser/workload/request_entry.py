"""A request as workload files write it: a prompt or a chat, with an arrival time, sampling parameters and an urgency of its
own."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Strict

from splitwiser.errors import InputError
from splitwiser.formats import AtLeastOne, AtLeastZero, Text, Whole, must_be, parse_as
from splitwiser.request import PromptInput, SamplingParams, check_messages
from splitwiser.text import check_text, read_text
from splitwiser.workload.planned import PlannedRequest
from splitwiser.workload.reports import Report

TextOrIds = Annotated[
    Annotated[str, Strict()] | tuple[Annotated[int, Strict()], ...],
    MinLen(1),
    must_be("text or a list of token ids, and not empty"),
]
Seconds = Annotated[float, Strict(), Ge(0), Le(sys.float_info.max), must_be("0 or more seconds")]
_Milliseconds = Annotated[float, Strict(), Gt(0), Le(sys.float_info.max), must_be("more than 0 milliseconds")]
_Number = Annotated[float, Strict(), must_be("a number")]
_TokenIds = Annotated[list[Annotated[int, Strict()]], must_be("a list of token ids")]
_Bias = Annotated[dict[str, Annotated[float, Strict()]], must_be("an object of numbers by token id")]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Fields of :class:`SamplingParams` as a file gives them, None where it does not."""

    n: AtLeastOne | None = None
    max_tokens: AtLeastOne | None = None
    temperature: _Number | None = None
    top_k: Whole | None = None
    top_p: _Number | None = None
    min_p: _Number | None = None
    repetition_penalty: _Number | None = None
    presence_penalty: _Number | None = None
    frequency_penalty: _Number | None = None
    logit_bias: _Bias | None = None
    seed: Whole | None = None
    min_tokens: AtLeastZero | None = None
    stop: Annotated[Text | list[Text] | None, must_be("text or a list of texts")] = None
    stop_token_ids: _TokenIds | None = None
    ignore_eos: Annotated[Annotated[bool, Strict()] | None, must_be("true or false")] = None
    logprobs: AtLeastZero | None = None
    prompt_logprobs: AtLeastZero | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The parameters that the file gives, by name, without ``max_tokens``."""
        names = [each.name for each in fields(Sampling) if each.name != "max_tokens"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class _Header(Sampling):
    """The format of a line for all lines after it."""

    adapter: Text | None = None


@dataclass(frozen=True, kw_only=True)
class _Entry(_Header):
    """The format of a request."""

    prompt: TextOrIds | None = None
    messages: Annotated[list[dict[str, Any]] | None, must_be("a list of messages")] = None
    arrival_s: Seconds | None = None
    priority: Whole = 0
    ttft_target_ms: _Milliseconds | None = None
    predicted_tokens: AtLeastOne | None = None


def parse_sampling(kind: type[Sampling], content: Mapping[str, Any], where: str) -> Any:  # noqa: ANN401  # a ``kind``
    """Return ``content`` as a ``kind``. Raises :class:`InputError`, beginning with ``where``, for a parameter that is
    unknown, not taken or out of range."""
    known = {each.name for each in fields(kind)}
    for name in content:
        if name in SamplingParams.NOT_TAKEN and name not in known:
            raise InputError(f"{where}: '{name}' is not taken: {SamplingParams.NOT_TAKEN[name]}")
    read = parse_as(kind, content, where)
    try:
        SamplingParams(max_tokens=None, **read.given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return read


@dataclass(frozen=True)
class Defaults:
    """What holds for a request of a file that does not say otherwise: its number of new tokens, its arrival time, its
    sampling parameters by name, and its adapter."""

    max_tokens: int | None = None
    arrival_s: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None


def parse_request(content: Mapping[str, Any], defaults: Defaults, where: str) -> PlannedRequest:
    """Return the request that ``content``, an object of a file, describes: ``prompt`` or ``messages``, and where it has
    them ``arrival_s``, ``adapter``, ``priority``, ``ttft_target_ms``, ``predicted_tokens``, ``max_tokens`` and other fields
    of :class:`SamplingParams`.

    Raises :class:`InputError` that begins with ``where`` and names the field.
    """
    entry: _Entry = parse_sampling(_Entry, content, where)
    if (entry.prompt is None) == (entry.messages is None):
        raise InputError(f"{where}: needs 'prompt' or 'messages', and one of them alone")
    max_tokens = entry.max_tokens or defaults.max_tokens
    if max_tokens is None:
        raise InputError(f"{where}: its number of new tokens, 'max_tokens', is missing")
    arrival_s = defaults.arrival_s if entry.arrival_s is None else entry.arrival_s
    prompt: PromptInput
    if entry.messages is not None:
        messages = check_messages(entry.messages, where)
        prompt, text = {"messages": messages}, messages[-1]["content"]
    else:
        assert entry.prompt is not None
        prompt = entry.prompt
        text = check_text(prompt, where) if isinstance(prompt, str) else ""
    sampling = {**defaults.sampling, **entry.given}
    adapter = entry.adapter or defaults.adapter
    return PlannedRequest(
        prompt, 0, max_tokens, arrival_s or 0.0, Report(text), sampling, adapter,
        priority=entry.priority, ttft_target_ms=entry.ttft_target_ms, predicted_tokens=entry.predicted_tokens,
    )  # fmt: skip


def read_request_lines(path: Path) -> list[PlannedRequest]:
    """Read a file of one request a line, ``{"prompt": ...}`` or ``{"messages": [...]}`` with the fields of
    :func:`parse_request`. A first line with neither prompt nor messages gives parameters for all lines.

    Raises :class:`InputError` naming the file, the line and the field.
    """
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError as error:
        raise InputError(f"--workload {path}: no such file") from error
    except (ValueError, OSError) as error:
        raise InputError(f"--workload {path}: cannot be read as text: {error}") from error
    defaults = Defaults()
    requests: list[PlannedRequest] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"--workload {path}, line {number}"
        content = _parse_line(line, where)
        if number == 1 and not content.keys() & {"prompt", "messages"}:
            header: _Header = parse_sampling(_Header, content, where)
            defaults = Defaults(header.max_tokens, None, header.given, header.adapter)
        else:
            requests.append(parse_request(content, defaults, where))
    if not requests:
        raise InputError(f"--workload {path}: no requests in it; at least one is needed")
    return requests


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: must be an object with 'prompt' or 'messages'")
    return content
