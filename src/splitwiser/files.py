"""The files that commands read and write: YAML, CSVs that are never found half-written, and folders of results."""

import contextlib
import csv
import fcntl
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from splitwiser.errors import InputError, first_line
from splitwiser.text import read_text

Status = Literal["running", "finished", "failed", "interrupted"]  # of a command, as its record says


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


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file at ``path`` by ``content``, in its order."""
    replace(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


class CsvTable:
    """A CSV that grows: rows are kept until :meth:`flush`, which another thread may call, appends them."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path = path
        self._columns = columns
        self._rows: deque[Mapping[str, Any]] = deque()
        header = _line(columns).encode()
        path.write_bytes(header)
        self._nbytes = len(header)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep ``row`` for the next flush; a column that it lacks stays empty. Raises ValueError for a key that is no
        column."""
        _check_columns(self._path, row, self._columns)
        self._rows.append(row)

    def flush(self) -> None:
        """Append the rows that were added since the last flush. If that fails, they are kept for the next."""
        rows = [self._rows.popleft() for _ in range(len(self._rows))]
        if not rows:
            return
        try:
            text = "".join(_line(row.get(name) for name in self._columns) for row in rows)
            with self._path.open("r+b") as file:
                file.truncate(self._nbytes)  # what an attempt that failed has left
                file.seek(self._nbytes)
                file.write(text.encode(errors="backslashreplace"))  # half of a surrogate pair is spelt out
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
    """Replace the CSV at ``path``; a column that a row lacks stays empty. Raises ValueError for a key that is no column."""
    lines = [_line(columns)]
    for row in rows:
        _check_columns(path, row, columns)
        lines.append(_line(row.get(name) for name in columns))
    replace(path, "".join(lines))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add ``row`` to the CSV at ``path``; columns that only one side has stay empty in the other. Several runs may do so at
    once: a lock file keeps them apart, and the CSV is replaced as a whole."""
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
    """``value`` as a CSV has it: nothing for None and NaN, and what would part cells or lines in quotes. (Python's writer
    leaves a bare carriage return as it is, at which readers end the row.)"""
    text = "" if value is None or value != value else str(value)
    if not any(mark in text for mark in ',"\r\n'):
        return text
    doubled = text.replace('"', '""')
    return f'"{doubled}"'


def replace(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader, or a run killed half-way, finds the old content or the new."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes the file ``path`` once the block has ended well. An OSError names ``path``."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:  # of a full disk no file is named
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def make_run_directory(results: Path, model: str, case: str, mode: str) -> Path:
    """Make a folder ``<model>_case<id>_<mode>_<UTC time>`` under ``results``; see :func:`make_directory`."""
    return make_directory(results, f"{model}_{case}_{mode}")


def make_directory(results: Path, kind: str) -> Path:
    """Make a folder ``<kind>_<UTC time>`` under ``results``; a number is added if two commands start in the same second.
    Raises :class:`InputError` where none can be made."""
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
            f"--results {results}: no folder can be made there: {error.strerror}; give one that can be written"
        ) from error
    raise FileExistsError(f"{results / name} and 999 numbered ones exist")
