"""Run options from text and YAML, and back to arguments."""

import argparse
from typing import Any

import pytest

from splitwiser.config import RunConfig
from splitwiser.options import (
    UsageError,
    add_options,
    given_options,
    parse_options,
    split_options,
    to_arguments,
    typed_options,
)
from tests.support.assertions import assert_says, refusal


def test_only_what_is_given_is_found() -> None:
    assert parse_options(["--max-batch", "8", "--no-lend"], RunConfig) == {"max_batch": 8, "lend": False}


def test_with_defaults_the_options_are_a_whole_configuration() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, RunConfig)
    assert RunConfig(**given_options(parser.parse_args([]), RunConfig)) == RunConfig()


def test_text_is_quoted_as_for_a_shell() -> None:
    found = split_options(" --mode mp --workers '[{role: mixed, count: 2}]'", RunConfig)
    assert found == {"mode": "mp", "workers": "[{role: mixed, count: 2}]"}


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "mp", "limit": 3, "temperature": 0.5, "ignore_eos": True, "lend": False},
        {"workers": "[{role: mixed, count: 2}]", "model": "a b'c", "data": "-x"},
    ],
)
def test_arguments_come_back_as_they_were(options: dict[str, Any]) -> None:
    assert parse_options(to_arguments(options), RunConfig) == options


@pytest.mark.parametrize(
    ("given", "typed"),
    [
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"limit": None, "max_batch": 4}, {"max_batch": 4}),
        ({"split": 7}, {"split": "7"}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
    ],
)
def test_values_from_yaml_become_those_of_the_command_line(given: dict[str, Any], typed: dict[str, Any]) -> None:
    found = typed_options(given, RunConfig)
    assert found == typed
    assert [type(value) for value in found.values()] == [type(value) for value in typed.values()]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"max_bach": 4}, ["unknown option 'max_bach'", "max_batch"]),
        ({"max_batch": "many"}, ["--max_batch must be a whole number, not 'many'"]),
        ({"max_batch": 2.5}, ["--max_batch", "2.5"]),
        ({"max_batch": True}, ["option 'max_batch' cannot be true or false"]),
        ({"ignore_eos": "yes"}, ["option 'ignore_eos' must be true or false", "'yes'"]),
        ({"workers": [{"role": "mixed"}]}, ["option 'workers' must be one value, in quotation marks"]),
    ],
)
def test_a_wrong_value_from_yaml_is_named(given: dict[str, Any], parts: list[str]) -> None:
    assert_says(refusal(typed_options, given, RunConfig), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("--mod mp", ["unknown option '--mod'", "--mode"]),
        ("--mode", ["--mode", "expected one argument"]),
        ("--workers '[", ["No closing quotation"]),
    ],
)
def test_wrong_text_is_named(text: str, parts: list[str]) -> None:
    assert_says(refusal(split_options, text, RunConfig), *parts)


def test_a_configuration_shows_what_differs_from_its_defaults() -> None:
    assert repr(RunConfig(max_batch=5, dtype="half", workers="")) == "RunConfig(dtype='float16', max_batch=5)"
    many = repr(RunConfig(mode="mp", workers="[{role: prefill}, {role: decode, share: 50}]", model="/a/" * 99))
    assert len(many) < 160


def test_arguments_that_cannot_be_parsed_come_with_their_usage() -> None:
    with pytest.raises(UsageError) as refused:
        parse_options(["--max-batchs=3"], RunConfig)
    assert refused.value.cli_message == "unknown option '--max-batchs'; did you mean --max_batch?"
    assert refused.value.usage.startswith("usage: ")
    with pytest.raises(UsageError, match="unexpected argument 'tpot:50'; a value with spaces needs quotation marks"):
        parse_options(["--goodput", "ttft:200", "tpot:50"], RunConfig)


@pytest.mark.parametrize(
    "arguments",
    [["--adapter", "lora", "--adapter=prefix"], ["--adapters=lora,prefix"], ["--adapter", "lora,prefix"]],
)
def test_an_option_of_several_values_may_be_given_several_times(arguments: list[str]) -> None:
    assert parse_options(arguments, RunConfig) == {"adapters": "lora,prefix"}
