"""Named workloads: files of ``configs/workloads`` that give some options of a run at once."""

from pathlib import Path
from typing import Any

from splitwiser import constants
from splitwiser.errors import InputError, unknown_name
from splitwiser.files import read_yaml

OPTIONS = ("requests", "prompt_tokens", "output_tokens", "max_prompt_tokens", "request_rate", "max_concurrency")
"""Options that a named workload may set: those that are None unless given, so that given ones can be recognised."""
EXAMPLE = "{requests: 64, prompt_tokens: 512, output_tokens: 64}"


def workload_names() -> list[str]:
    """Return the names of the workloads in ``configs/workloads``."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def read_named_workload(name: str) -> dict[str, Any]:
    """Return the options, as read from YAML, of the workload ``name``. Raises :class:`InputError` naming its file."""
    path = _folder() / f"{name}.yaml"
    content = read_yaml(path)
    if not isinstance(content, dict) or "prompt_tokens" not in content:
        raise InputError(f"{path}: must map options to values, prompt_tokens among them, such as {EXAMPLE}")
    for key in content:
        if key not in OPTIONS:
            raise InputError(f"{path}: {unknown_name('option', key, OPTIONS)}")
    return content


def _folder() -> Path:
    return constants.DIR_CONFIGS / "workloads"
