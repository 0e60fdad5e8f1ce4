"""The kinds of failure, their exit codes and the hints of their messages."""

import pytest

from splitwiser.errors import (
    InputError,
    RunError,
    SplitwiserError,
    UnsupportedModelError,
    check_keywords,
    find_nearest,
    first_line,
    unknown_name,
)

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
        (ValueError("wrong:\n   a number\nof it"), "wrong: a number"),
        (ValueError("\n\n  wrong\nand more"), "wrong"),
        (ValueError(""), "ValueError"),
        (KeyError(), "KeyError"),
        (OSError(2, "No such file", "a.txt"), "[Errno 2] No such file: 'a.txt'"),
    ],
)
def test_first_line_of_what_an_error_says(error: BaseException, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("message", "in_python"),
    [
        ("--max_batch must be 1 or more, not 0", "max_batch must be 1 or more, not 0"),
        ("give --rate (--load) or '--share auto'", "give rate (load) or 'share auto'"),
        ("'nvidia-smi --query-gpu=mode -c 3' failed -- twice", "'nvidia-smi --query-gpu=mode -c 3' failed -- twice"),
    ],
)
def test_options_are_spelt_as_the_caller_does(message: str, in_python: str) -> None:
    error = InputError(message)
    assert (error.cli_message, str(error)) == (message, in_python)


@pytest.mark.parametrize(
    ("given", "near"),
    [("--max_batchs", ["--max_batch"]), ("--MAX-BATCH", ["--max_batch"]), ("--zzz", []), ("batch", ["--max_batch"])],
)
def test_the_nearest_name_whatever_its_case(given: str, near: list[str]) -> None:
    assert find_nearest(given, ["--max_batch", "--mode", "--prefill_tokens", "--output_tokens"]) == near


def test_a_keyword_of_another_library_gets_its_reason() -> None:
    with pytest.raises(InputError, match="'num_beams' is no option: there is no beam search"):
        check_keywords("option", ["mode", "num_beams"], ["mode"], {"num_beams": "there is no beam search"})
    with pytest.raises(InputError, match="unknown option 'mod'; did you mean mode"):
        check_keywords("option", ["mod"], ["mode"], {})


def test_of_very_many_names_not_all_are_listed() -> None:
    assert str(unknown_name("column", "zzz", range(100))).endswith(", 28, 29 and 70 more")
