"""Reading and checking of users' text."""

from pathlib import Path

import pytest

from splitwiser.text import check_text, read_text
from tests.support.assertions import refusal


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_a_byte_order_mark_is_no_part_of_the_text(mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(mark + "größe\n".encode())
    assert read_text(path) == "größe\n"


def test_only_a_mark_at_the_start_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\xef\xbb\xbfb")
    assert read_text(path) == "a\ufeffb"


@pytest.mark.parametrize("text", ["", "größe", "\U0001f600", "\0"])
def test_whole_characters_are_text(text: str) -> None:
    assert check_text(text, "here") == text


@pytest.mark.parametrize(("half", "code"), [("\ud83d", "U+D83D"), ("\ude00", "U+DE00")])
def test_half_of_a_surrogate_pair_is_named(half: str, code: str) -> None:
    assert refusal(check_text, f"ab{half}", "row 3").startswith(
        f"row 3: character 3 is half of a surrogate pair ({code})"
    )
