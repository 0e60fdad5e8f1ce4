"""Named workloads: files of ``configs/workloads`` that give some options of a run at once."""

from typing import Any

from splitwiser.errors import InputError, unknown_name
from splitwiser.files import named_configs, read_yaml

FOLDER = "workloads"  # of configs/
OPTIONS = ("requests", "prompt_tokens", "output_tokens", "max_prompt_tokens", "request_rate", "max_concurrency")
"""Options that a named workload may set: those that are None unless given, so that given ones can be recognised."""
EXAMPLE = "{requests: 64, prompt_tokens: 512, output_tokens: 64}"


def read_named_workload(name: str) -> dict[str, Any]:
    """Return the options, as read from YAML, of the workload ``name``. Raises :class:`InputError` naming its file."""
    path = named_configs(FOLDER)[name]
    content = read_yaml(path)
    if not isinstance(content, dict) or "prompt_tokens" not in content:
        raise InputError(f"{path}: must map options to values, prompt_tokens among them, such as {EXAMPLE}")
    for key in content:
        if key not in OPTIONS:
            raise InputError(f"{path}: {unknown_name('option', key, OPTIONS)}")
    return content
