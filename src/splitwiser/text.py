"""Text as it comes in from users: files of UTF-8, with or without a byte order mark, and strings that can be written."""

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
