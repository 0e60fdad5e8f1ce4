"""Outcomes of trials, in files of this user's cache, which the next process with the same facts need not find anew. A file
that cannot be read, or whose checksum is wrong, counts as none."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from splitwiser.files import replace
from splitwiser.machine.user_cache import cache_directory

KEPT = 200  # outcomes at most; the oldest go first


class Remembered:
    """What was found for ``facts``, everything that it depends on, as ``outcome``, which is made of JSON's types; None if
    nothing is known. With ``facts`` of None nothing is kept."""

    def __init__(self, facts: Iterable[object] | None) -> None:
        self._path: Path | None = None
        self.outcome: Any = None
        if facts is None:
            return
        with suppress(OSError):
            key = hashlib.sha256("\n".join(map(repr, facts)).encode()).hexdigest()
            self._path = cache_directory() / "trials" / f"{key}.json"
            self.outcome = _read(self._path)

    def remember(self, outcome: object) -> None:
        """Keep ``outcome`` for the next process with the same facts, if the cache can be written."""
        if self._path is None:
            return
        text = json.dumps(outcome)
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            replace(self._path, f"{_checksum(text)}\n{text}")
            for old in sorted(self._path.parent.glob("*.json"), key=_modified_ns)[:-KEPT]:
                old.unlink(missing_ok=True)


def _read(path: Path) -> object:
    try:
        checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
        return json.loads(text) if checksum == _checksum(text) else None
    except (OSError, ValueError):
        return None


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _modified_ns(path: Path) -> int:
    with suppress(OSError):  # another process may have removed it
        return path.stat().st_mtime_ns
    return 0
