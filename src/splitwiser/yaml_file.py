"""Reads YAML files, such as those of named entries in ``configs/``."""

import re
from pathlib import Path
from typing import Any

import yaml

from splitwiser.errors import InputError, first_line
from splitwiser.text import read_text


class _Loader(yaml.SafeLoader):
    """Takes for a number only what reads as one in decimal, and for a date nothing: by YAML 1.1, 10:40 is 640 (to base 60)
    and 010 is 8."""


_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)",
}
_Loader.yaml_implicit_resolvers = {
    first: [each for each in resolvers if each[0].rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _form in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_form})$"), list("-+0123456789."))


def load_yaml(text: str) -> Any:  # noqa: ANN401  # as yaml.safe_load
    """What ``text`` holds. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # which is a safe one


def read_yaml(path: Path, hint: str = "") -> object:
    """The content of ``path``. Raises :class:`InputError` naming it; ``hint`` says where a missing file should lie."""
    try:
        return load_yaml(read_text(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file{hint}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as utf-8 text: {first_line(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def read_entries(path: Path, example: str) -> dict[Any, dict[str, Any]]:
    """The entries of ``path`` by name. Raises :class:`InputError` naming the file; ``example`` shows what one looks like."""
    entries = read_yaml(path, "; DIR_PROJECT in constants.py says where configs/ lies")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{path}: must map names to entries, such as '{example}'")
    return entries
