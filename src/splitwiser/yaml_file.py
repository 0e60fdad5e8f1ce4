"""Reads YAML files, such as those of named entries in ``configs/``."""

from pathlib import Path
from typing import Any

import yaml

from splitwiser.errors import InputError, first_line
from splitwiser.text import read_text


def read_yaml(path: Path, hint: str = "") -> object:
    """The content of ``path``. Raises :class:`InputError` naming it; ``hint`` says where a missing file should lie."""
    try:
        return yaml.safe_load(read_text(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file{hint}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as utf-8 text: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def read_entries(path: Path, example: str) -> dict[Any, dict[str, Any]]:
    """The entries of ``path`` by name. Raises :class:`InputError` naming the file; ``example`` shows what one looks like."""
    entries = read_yaml(path, "; DIR_PROJECT in constants.py says where configs/ lies")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{path}: must map names to entries, such as '{example}'")
    return entries
