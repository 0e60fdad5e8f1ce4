"""How an input is refused: with one line, which says what it should."""

from collections.abc import Callable
from typing import Any

import pytest

from splitwiser.errors import InputError


def refusal(call: Callable[..., object], *arguments: Any, **settings: Any) -> str:
    """The one line with which ``call`` refuses its input, as the command line shows it."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **settings)
    message = caught.value.cli_message
    assert len(message.splitlines()) == 1, message
    return message


def assert_says(message: str, *parts: str) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{message!r} does not say {missing}"
