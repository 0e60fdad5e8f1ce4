"""Reading and checking of users' text."""

from pathlib import Path

import pytest

from splitwiser.text import check_text, parse_bytes, read_text
from tests.support.assertions import assert_says, refusal


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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 2**20), ("4GiB", 4 * 2**30), ("1KiB", 1024), ("2kb", 2000), ("3MB", 3 * 10**6),
        ("1GB", 10**9), ("100B", 100), ("100", 100), ("1.5GiB", 3 * 2**29), ("0.5kib", 512), ("512 MiB", 512 * 2**20),
        ("  7mib\n", 7 * 2**20),
    ],
)  # fmt: skip
def test_size_in_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "MiB", "lots", "0", "0GiB", "-1GiB", "4G", "4TiB", "1,5GiB", "4 GiB of it", "nan", "nanGiB", "inf",
     "infGiB", "1e999", "0.1B", "AUTO please", "0x10"],
)  # fmt: skip
def test_wrong_size_shows_a_right_one(text: str) -> None:
    message = refusal(parse_bytes, text)
    assert_says(message, f"kv_memory '{text}' is not a size", "'auto'", "512MiB or 4GiB")
