"""Workload files in JSON: prompts, their lengths and when they arrive."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le, MinLen
from pydantic import Strict

from splitwiser.errors import InputError
from splitwiser.formats import AtLeastOne, Text, must_be, parse_as
from splitwiser.text import check_text, read_text
from splitwiser.workload.planned import PlannedRequest
from splitwiser.workload.reports import Report

_Prompt = Annotated[
    Annotated[str, Strict()] | tuple[Annotated[int, Strict()], ...],
    MinLen(1),
    must_be("text or a list of token ids, and not empty"),
]
_Time = Annotated[float, Strict(), Ge(0), Le(sys.float_info.max), must_be("0 or more seconds")]


@dataclass(frozen=True)
class _Content:
    """The format of a workload file."""

    prompts: Annotated[list[_Prompt], MinLen(1), must_be("a list with at least one prompt", itself=True)]
    max_new_tokens: AtLeastOne | list[AtLeastOne]
    arrival_s: list[_Time] | None = None
    adapter: Text | list[Text | None] | None = None


def read_prompt_file(path: Path) -> list[PlannedRequest]:
    """Read ``{"max_new_tokens": N, "prompts": [[token ids] | "text", ...], "arrival_s": [...], "adapter": "name"}``. The
    last two are optional: without arrival times, all arrive at once; without an adapter, a request gets the run's default.

    ``max_new_tokens`` is one number, or a list with one for each prompt, and so is ``adapter`` a name or a list of names.
    Raises :class:`InputError` naming the file and the field.
    """
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise InputError(f"--workload {path}: no such file") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"--workload {path}: not valid JSON: {error}") from error
    where = f"--workload {path}"
    if not isinstance(content, dict):
        raise InputError(f"{where}: must be an object with 'max_new_tokens' and 'prompts'")
    read = parse_as(_Content, content, where)
    count = len(read.prompts)
    new_tokens = read.max_new_tokens if isinstance(read.max_new_tokens, list) else [read.max_new_tokens] * count
    arrivals = [0.0] * count if read.arrival_s is None else read.arrival_s
    adapters = read.adapter if isinstance(read.adapter, list) else [read.adapter] * count
    given: dict[str, Sequence[object]] = {"max_new_tokens": new_tokens, "arrival_s": arrivals, "adapter": adapters}
    for name, values in given.items():
        if len(values) != count:
            raise InputError(f"{where}: '{name}' has {len(values)} entries for {count} prompts; give one each")
    for number, prompt in enumerate(read.prompts):
        if isinstance(prompt, str):
            check_text(prompt, f"{where}: prompt {number}")
    return [
        PlannedRequest(prompt, 0, tokens, arrival_s, Report(prompt if isinstance(prompt, str) else ""), adapter)
        for prompt, tokens, arrival_s, adapter in zip(read.prompts, new_tokens, arrivals, adapters, strict=True)
    ]
