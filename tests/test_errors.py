"""The kinds of failure, their exit codes and the hints of their messages."""

import pytest

from splitwiser.errors import InputError, RunError, SplitwiserError, UnsupportedModelError, first_line, unknown_name

MODELS = ["opt-125m", "llama2-7b-chat", "llama2-13b-chat", "llama2-70b-chat", "falcon-7b-instruct",
          "t5-base", "t5-large", "qwen3-0.6b", "smollm2-135m"]  # fmt: skip


@pytest.mark.parametrize(("kind", "exit_code"), [(InputError, 2), (UnsupportedModelError, 2), (RunError, 1)])
def test_exit_code_tells_a_wrong_input_from_a_fault(kind: type[SplitwiserError], exit_code: int) -> None:
    assert issubclass(kind, SplitwiserError)
    assert kind.exit_code == exit_code


def test_an_unsupported_model_is_a_wrong_input() -> None:
    assert issubclass(UnsupportedModelError, InputError)


def test_unknown_name_lists_the_few_that_exist() -> None:
    error = unknown_name("split", "tset", ("train", "validate", "test"))
    assert isinstance(error, InputError)
    assert str(error) == "unknown split 'tset'; did you mean test? known: train, validate, test"


def test_unknown_name_among_many_gets_the_nearest() -> None:
    assert (
        str(unknown_name("model", "falcon7b", MODELS)) == "unknown model 'falcon7b'; did you mean falcon-7b-instruct?"
    )


def test_at_most_three_nearest_are_named_best_first() -> None:
    message = str(unknown_name("model", "llama2-7b", MODELS))
    assert message.startswith("unknown model 'llama2-7b'; did you mean llama2-7b-chat or ")
    assert message.count(" or ") <= 2


def test_unknown_name_with_nothing_near_lists_all() -> None:
    assert str(unknown_name("model", "zzz", MODELS)).endswith("known: " + ", ".join(MODELS))


def test_names_may_be_numbers() -> None:
    assert str(unknown_name("case", 3, [0, 1, 2])) == "unknown case '3'; known: 0, 1, 2"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("wrong"), "wrong"),
        (ValueError("wrong\nand more\nof it"), "wrong"),
        (ValueError("\n\n  wrong\nand more"), "wrong"),
        (ValueError(""), "ValueError"),
        (KeyError(), "KeyError"),
        (OSError(2, "No such file", "a.txt"), "[Errno 2] No such file: 'a.txt'"),
    ],
)
def test_first_line_of_what_an_error_says(error: BaseException, line: str) -> None:
    assert first_line(error) == line
