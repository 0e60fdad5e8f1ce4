"""Workload files in JSON: prompts, their lengths and when they arrive."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen

from splitwiser.errors import InputError
from splitwiser.formats import AtLeastOne, Text, must_be
from splitwiser.text import read_text
from splitwiser.workload.planned import PlannedRequest
from splitwiser.workload.request_entry import Defaults, Sampling, Seconds, TextOrIds, parse_request, parse_sampling

_Prompt = Annotated[
    TextOrIds | dict[str, Any], MinLen(1), must_be("text, a list of token ids or a request, and not empty")
]


@dataclass(frozen=True, kw_only=True)
class _Content(Sampling):
    """The format of a workload file; what it says of sampling holds for requests that do not say otherwise."""

    prompts: Annotated[list[_Prompt], MinLen(1), must_be("a list with at least one prompt", itself=True)]
    max_new_tokens: AtLeastOne | list[AtLeastOne] | None = None
    arrival_s: list[Seconds] | None = None
    adapter: Text | list[Text | None] | None = None


def read_prompt_file(path: Path) -> list[PlannedRequest]:
    """Read ``{"max_new_tokens": N, "prompts": [[token ids] | "text" | {request}, ...], "arrival_s": [...], "adapter":
    "name"}`` with sampling parameters for all beside them. The last two are optional: without arrival times, all arrive at
    once; without an adapter, a request gets the run's default.

    ``max_new_tokens`` is one number (which may also be called ``max_tokens``) or a list with one for each prompt, and so is
    ``adapter`` a name or a list of names; a request as in :func:`splitwiser.workload.request_entry.parse_request` may give
    its own. Raises :class:`InputError` naming the file and the field.
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
    read: _Content = parse_sampling(_Content, content, where)
    count = len(read.prompts)
    if read.max_tokens is not None and read.max_new_tokens is not None:
        raise InputError(f"{where}: 'max_tokens' and 'max_new_tokens' say the same; give one of them")
    most = read.max_tokens if read.max_new_tokens is None else read.max_new_tokens
    new_tokens = most if isinstance(most, list) else [most] * count
    arrivals = [None] * count if read.arrival_s is None else read.arrival_s
    adapters = read.adapter if isinstance(read.adapter, list) else [read.adapter] * count
    given: dict[str, Sequence[object]] = {"max_new_tokens": new_tokens, "arrival_s": arrivals, "adapter": adapters}
    for name, values in given.items():
        if len(values) != count:
            raise InputError(f"{where}: '{name}' has {len(values)} entries for {count} prompts; give one each")
    return [
        parse_request(
            prompt if isinstance(prompt, dict) else {"prompt": prompt},
            Defaults(tokens, arrival_s, read.given, adapter),
            f"{where}: prompt {number}",
        )
        for number, (prompt, tokens, arrival_s, adapter) in enumerate(
            zip(read.prompts, new_tokens, arrivals, adapters, strict=True)
        )
    ]
