"""Text from users: UTF-8 files with or without a byte order mark, valid strings, sizes in bytes, and names of devices."""

import reprlib
from pathlib import Path

from splitwiser.errors import InputError


def read_text(path: Path) -> str:
    """Return the text of the UTF-8 file ``path``, without the byte order mark that some editors write. Raises OSError and
    UnicodeDecodeError."""
    return path.read_text(encoding="utf-8-sig")


def check_text(text: str, where: str) -> str:
    """Return ``text`` if it is valid Unicode. Raises :class:`InputError`, beginning with ``where``, for half of a surrogate
    pair, which JSON may contain (from text cut inside an emoji) but tokenizers and files cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start + 1} is half of a surrogate pair (U+{ord(text[error.start]):04X}), as in "
            "text cut inside an emoji; remove it or insert the whole character"
        ) from error
    return text


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 40


def shorten(value: object) -> str:
    """Return ``repr(value)`` without the middle of long texts and the end of long collections."""
    return _SHORT.repr(value)


_UNITS = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as ``512MiB`` or ``4GiB``. Raises :class:`InputError` for any other text."""
    folded = text.strip().lower()
    unit = next((unit for unit in _UNITS if folded.endswith(unit)), "")
    try:
        size = int(float(folded[: len(folded) - len(unit)]) * _UNITS[unit or "b"])
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise InputError(
            f"--kv_memory '{text}' is not a size; write 'auto' or a number with a unit, such as 512MiB or 4GiB"
        )
    return size


def format_size(nbytes: int) -> str:
    """Return ``nbytes`` as text, in MiB or GiB."""
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.1f} MiB"


def parse_device(text: str) -> tuple[str, int | None]:
    """Return the kind of a device ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, and N. Raises :class:`InputError` for any other
    text."""
    kind, _, number = text.partition(":")
    if text not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise InputError(f"--device '{text}': must be auto, cpu, cuda or cuda:N")
    return kind, int(number) if number else None
