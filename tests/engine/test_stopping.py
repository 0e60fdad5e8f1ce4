"""When a request ends, and what text it leaves."""

from collections.abc import Sequence
from typing import Any

import pytest

from splitwiser.engine.stopping import final_text, finish_reason
from splitwiser.request import SamplingParams

EOS = (1, 2)


def decode(token_ids: Sequence[int]) -> str:
    """Tokens from 97 on are letters."""
    return "".join(chr(token) for token in token_ids)


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def no_text(_: Sequence[int]) -> str:
    raise AssertionError("nothing asked for the text")


@pytest.mark.parametrize(
    ("settings", "token_ids", "reason"),
    [
        pytest.param({}, ids("abc"), None, id="goes on"),
        pytest.param({"max_tokens": 4}, ids("abc"), None, id="one more to come"),
        pytest.param({"max_tokens": 3}, ids("abc"), "length", id="at max_tokens"),
        pytest.param({"max_tokens": 1}, ids("a"), "length", id="at one token"),
        pytest.param({}, [*ids("ab"), 1], "stop", id="end of sequence"),
        pytest.param({}, [*ids("ab"), 2], "stop", id="another end of sequence"),
        pytest.param({}, [1], "stop", id="end of sequence as the first token"),
        pytest.param({"max_tokens": 3}, [*ids("ab"), 2], "stop", id="end of sequence goes before length"),
        pytest.param({"ignore_eos": True}, [*ids("ab"), 2], None, id="ignored end of sequence"),
        pytest.param({"ignore_eos": True, "max_tokens": 3}, [*ids("ab"), 2], "length", id="ignored, and at max_tokens"),
        pytest.param({}, [*ids("a"), 2, *ids("b")], None, id="only the last token ends"),
        pytest.param({"stop": ("c",)}, ids("abc"), "stop", id="stop string"),
        pytest.param({"stop": ("bc",)}, ids("abc"), "stop", id="stop string over two tokens"),
        pytest.param({"stop": ("x", "bc")}, ids("abc"), "stop", id="one of two stop strings"),
        pytest.param({"stop": ("cd",)}, ids("abc"), None, id="half a stop string"),
        pytest.param({"stop": ("c",), "max_tokens": 3}, ids("abc"), "stop", id="stop string goes before length"),
        pytest.param(
            {"stop": ("c",), "ignore_eos": True}, ids("abc"), "stop", id="stop string without end of sequence"
        ),
    ],
)
def test_reason(settings: dict[str, Any], token_ids: list[int], reason: str | None) -> None:
    assert finish_reason(SamplingParams(**settings), token_ids, EOS, decode) == reason


def test_text_is_made_only_for_stop_strings() -> None:
    assert finish_reason(SamplingParams(), ids("abc"), EOS, no_text) is None


def test_a_model_without_an_end_of_sequence_goes_on() -> None:
    assert finish_reason(SamplingParams(), [1, 2], (), no_text) is None


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), "abcabc"),
        (("x",), "abcabc"),
        (("c",), "ab"),
        (("bc", "c"), "a"),
        (("c", "bc"), "a"),
        (("abc",), ""),
        (("ca", "x"), "ab"),
    ],
)
def test_text_is_cut_before_the_first_stop_string(stop: tuple[str, ...], text: str) -> None:
    assert final_text(SamplingParams(stop=stop), ids("abcabc"), decode) == text
