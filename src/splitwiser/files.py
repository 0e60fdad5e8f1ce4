"""Reads and writes the files of the commands: YAML, CSV files that are replaced atomically, and result folders."""

import contextlib
import csv
import fcntl
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml

from splitwiser import constants
from splitwiser.errors import InputError, first_line, unknown_name
from splitwiser.text import read_text

Status = Literal["running", "finished", "failed", "interrupted"]  # of a command, as its record says


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, where PyYAML has it


class _Loader(_SafeLoader):  # type: ignore[misc]
    """A YAML loader that reads only decimal numbers as numbers, and nothing as a date: by YAML 1.1, 10:40 would be 640
    (base 60) and 010 would be 8."""


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
    """Return the content of the YAML document ``text``. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # a subclass of SafeLoader


def named_configs(folder: str) -> dict[str, Path]:
    """Return the files of ``configs/<folder>`` by name, such as ``standard`` for ``configs/workloads/standard.yaml``."""
    return {path.stem: path for path in sorted((constants.DIR_CONFIGS / folder).glob("*.yaml"))}


def find_config(folder: str, given: str, what: str) -> Path:
    """Return the file that ``given`` names: a name of ``configs/<folder>`` or else a path. Raises :class:`InputError`, which
    calls it ``what``, if there is neither."""
    named = named_configs(folder)
    path = named.get(given, Path(given))
    if not path.exists():
        raise InputError(f"{what} {given}: no such file, and {unknown_name(f'name of configs/{folder}', given, named)}")
    return path


def read_yaml(path: Path) -> object:
    """Return the content of the YAML file at ``path``. Raises :class:`InputError` naming it."""
    try:
        return load_yaml(read_text(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as utf-8 text: {first_line(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def read_entries(path: Path, example: str) -> dict[Any, dict[str, Any]]:
    """Return the entries of the YAML file at ``path`` by name. Raises :class:`InputError` naming the file; ``example`` is an
    entry for the message."""
    entries = read_yaml(path)
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{path}: must map names to entries, such as '{example}'")
    return entries


class _Dumper(yaml.SafeDumper):
    """Writes paths as text."""


_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file at ``path`` with ``content`` as YAML, keys in their order."""
    replace(path, yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class CsvTable:
    """A growing CSV file: :meth:`add` keeps rows until :meth:`flush`, which another thread may call, appends them."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path = path
        self._columns = columns
        self._rows: deque[Mapping[str, Any]] = deque()
        header = _line(columns).encode()
        path.write_bytes(header)
        self._nbytes = len(header)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep ``row`` for the next flush; a missing column stays empty. Raises ValueError for a key that is not a
        column."""
        _check_columns(self._path, row, self._columns)
        self._rows.append(row)

    def flush(self) -> None:
        """Append the rows added since the last flush. If that fails, they are kept for the next flush."""
        rows = [self._rows.popleft() for _ in range(len(self._rows))]
        if not rows:
            return
        try:
            text = "".join(_line(row.get(name) for name in self._columns) for row in rows)
            with self._path.open("r+b") as file:
                file.truncate(self._nbytes)  # remove the rest of a failed attempt
                file.seek(self._nbytes)
                file.write(text.encode(errors="backslashreplace"))  # escapes lone surrogates
                file.flush()
                self._nbytes = file.tell()
        except BaseException:
            self._rows.extendleft(reversed(rows))
            raise

    def write(self, row: Mapping[str, Any]) -> None:
        """Append ``row`` at once; see :meth:`add`."""
        self.add(row)
        self.flush()


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[Any, Any]]) -> None:
    """Replace the CSV file at ``path``; missing columns stay empty. Raises ValueError for a key that is not a column."""
    lines = [_line(columns)]
    for row in rows:
        _check_columns(path, row, columns)
        lines.append(_line(row.get(name) for name in columns))
    replace(path, "".join(lines))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append ``row`` to the CSV file at ``path``; columns that only the file or only the row has stay empty in the other.
    Safe for concurrent processes: a lock file serialises them, and the file is replaced atomically."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows: list[Mapping[str, Any]] = []
        columns: list[str] = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                columns += reader.fieldnames or ()
                rows += reader
        write_rows(path, [*columns, *(name for name in row if name not in columns)], [*rows, row])


def _check_columns(path: Path, row: Mapping[Any, Any], columns: Sequence[str]) -> None:
    unknown = [name for name in row if name not in columns]
    if unknown:
        raise ValueError(
            f"{path.name} has no column {', '.join(map(repr, unknown))}; its columns are {', '.join(columns)}"
        )


def _line(values: Iterable[object]) -> str:
    return f"{','.join(map(_cell, values))}\n"


def _cell(value: object) -> str:
    """Return ``value`` as a CSV cell: empty for None and NaN, quoted if it contains a separator. (Python's csv writer does
    not quote a bare carriage return, at which readers end the row.)"""
    text = "" if value is None or value != value else str(value)
    if not any(mark in text for mark in ',"\r\n'):
        return text
    doubled = text.replace('"', '""')
    return f'"{doubled}"'


def replace(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically: readers see the old content or the new, even if the process is killed."""
    with replaced_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` atomically when the block succeeds. An OSError names ``path``."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:  # the error of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def make_run_directory(results: Path, model: str, case: str, mode: str) -> Path:
    """Create the folder ``<model>_<case>_<mode>_<UTC time>`` under ``results``; see :func:`make_directory`."""
    return make_directory(results, f"{model}_{case}_{mode}")


def make_directory(results: Path, kind: str) -> Path:
    """Create the folder ``<kind>_<UTC time>`` under ``results``; a number is added if two commands start in the same second.
    Raises :class:`InputError` if it cannot be created."""
    name = f"{kind}_{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    try:
        results.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            directory = results / (name if attempt == 1 else f"{name}-{attempt}")
            with contextlib.suppress(FileExistsError):
                directory.mkdir()
                return directory
    except OSError as error:
        raise InputError(
            f"--results {results}: cannot create a folder there: {error.strerror}; give a writable directory"
        ) from error
    raise FileExistsError(f"{results / name} and 999 numbered ones exist")
