"""Text as it comes in from users: files of UTF-8, with or without a byte order mark, strings that can be written, sizes."""

from pathlib import Path

from splitwiser.errors import InputError


def read_text(path: Path) -> str:
    """The text of ``path``, which is UTF-8, without the byte order mark that some editors put first. Raises OSError and
    UnicodeDecodeError."""
    return path.read_text(encoding="utf-8-sig")


def check_text(text: str, where: str) -> str:
    """``text``, if it is whole characters. Raises :class:`InputError` that begins with ``where`` for half of a surrogate
    pair, which JSON can hold (of text cut inside an emoji), and which neither a tokenizer nor a file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start + 1} is half of a surrogate pair (U+{ord(text[error.start]):04X}), as of text "
            "cut inside an emoji; take it out or put the whole character in"
        ) from error
    return text


_UNITS = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``512MiB`` or ``4GiB``. Raises :class:`InputError`."""
    folded = text.strip().lower()
    unit = next((unit for unit in _UNITS if folded.endswith(unit)), "")
    try:
        size = int(float(folded[: len(folded) - len(unit)]) * _UNITS[unit or "b"])
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise InputError(
            f"kv_memory '{text}' is not a size; write 'auto' or a number with a unit, such as 512MiB or 4GiB"
        )
    return size
