"""Workload files: prompts, their lengths and when they arrive, as JSON."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from splitwiser.errors import InputError
from splitwiser.text import check_text, read_text


@dataclass(frozen=True)
class Workload:
    """Prompts (text or token ids), the most new tokens that each gets, and arrival times in seconds from the start (all 0
    if the file names none)."""

    prompts: tuple[str | tuple[int, ...], ...]
    max_new_tokens: tuple[int, ...]
    arrival_s: tuple[float, ...]


def load_workload(path: Path) -> Workload:
    """Read ``{"max_new_tokens": N, "prompts": [[token ids] | "text", ...], "arrival_s": [...]}`` (the last optional).

    ``max_new_tokens`` is one number, or a list with one for each prompt. Raises :class:`InputError` naming the file and
    the field.
    """
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise InputError(f"--workload {path}: no such file") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"--workload {path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"--workload {path}: must be an object with 'max_new_tokens' and 'prompts'")
    for key in content:
        if key not in ("max_new_tokens", "prompts", "arrival_s"):
            raise InputError(f"--workload {path}: unknown field '{key}'; known: max_new_tokens, prompts, arrival_s")
    new_tokens, prompts = content.get("max_new_tokens"), content.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        raise InputError(f"--workload {path}: 'prompts' must be a list with at least one prompt")
    for number, prompt in enumerate(prompts):
        is_ids = isinstance(prompt, list) and all(map(_is_whole, prompt))
        if not prompt or not (isinstance(prompt, str) or is_ids):
            raise InputError(f"--workload {path}: prompt {number} must be text or a list of token ids, and not empty")
        if isinstance(prompt, str):
            check_text(prompt, f"--workload {path}: prompt {number}")
    if not isinstance(new_tokens, list):
        new_tokens = [new_tokens] * len(prompts)
    elif len(new_tokens) != len(prompts):
        raise InputError(
            f"--workload {path}: 'max_new_tokens' must be one number, or a list with one for each of the {len(prompts)} "
            f"prompts, not of {len(new_tokens)}"
        )
    for each in new_tokens:
        if not _is_whole(each) or each < 1:
            raise InputError(f"--workload {path}: 'max_new_tokens' must be a whole number of 1 or more, not {each!r}")
    arrivals = content.get("arrival_s", [0.0] * len(prompts))
    if not isinstance(arrivals, list) or len(arrivals) != len(prompts):
        raise InputError(
            f"--workload {path}: 'arrival_s' must be a list with one number for each of the {len(prompts)} prompts"
        )
    for number, arrival in enumerate(arrivals):
        if isinstance(arrival, bool) or not isinstance(arrival, (int, float)) or not 0 <= arrival <= sys.float_info.max:
            raise InputError(
                f"--workload {path}: arrival_s of prompt {number} must be 0 or more seconds, not {arrival!r}"
            )
    return Workload(
        tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts),
        tuple(new_tokens),
        tuple(map(float, arrivals)),
    )


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
