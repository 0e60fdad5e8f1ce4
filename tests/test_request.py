"""Sampling parameters and their limits, what a request needs, and the times derived from its tokens."""

import dataclasses
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest

from splitwiser.errors import InputError
from splitwiser.request import Request, RequestMetrics, SamplingParams
from tests.support.records import make_output


def test_greedy_is_the_default() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.stop, params.ignore_eos) == (0, 0, 1, (), False)
    assert (params.max_tokens, params.seed) == (16, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 1},
        {"temperature": 0},
        {"temperature": 100.0},
        {"top_k": 1},
        {"top_k": 10**9},
        {"top_p": 1e-9},
        {"top_p": 1},
        {"seed": -5},
        {"min_p": 1},
        {"repetition_penalty": 1e-3},
        {"presence_penalty": -2},
        {"frequency_penalty": 2},
        {"min_tokens": 16},
        {"logit_bias": {0: -100, 7: 100}},
        {"stop": ("a", "\n")},
    ],
)
def test_limits_themselves_are_fine(settings: dict[str, Any]) -> None:
    params = SamplingParams(**settings)
    assert {key: getattr(params, key) for key in settings} == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more, or None for all there is room for, not 0"),
        ({"max_tokens": -3}, "max_tokens must be 1 or more, or None for all there is room for, not -3"),
        ({"temperature": -0.1}, "temperature must be 0 (greedy) or more, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 (greedy) or more, not nan"),
        ({"top_k": -2}, "top_k must be 1 or more, or 0 or -1 for all tokens, not -2"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, not 1.01"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, not nan"),
        ({"stop": ("abc", "")}, "stop must be a string or a sequence of strings, none of them empty, not ('abc', '')"),
        ({"stop": (3,)}, "stop must be a string or a sequence of strings, none of them empty, not (3,)"),
        (
            {"temprature": 1.0},
            "unknown option of SamplingParams 'temprature'; did you mean temperature?",
        ),
        ({"max_new_tokens": 5}, "'max_new_tokens' is no option of SamplingParams: here it is max_tokens"),
        ({"min_new_tokens": 5}, "'min_new_tokens' is no option of SamplingParams: here it is min_tokens"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, not 1.5"),
        ({"presence_penalty": -2.5}, "presence_penalty must be from -2 to 2, not -2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be from -2 to 2, not nan"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, or 1 for none, not 0"),
        ({"min_tokens": -1}, "min_tokens must be a whole number of 0 or more, not -1"),
        ({"min_tokens": 17}, "min_tokens must be at most max_tokens, 16, not 17"),
        ({"stop_token_ids": "a"}, "stop_token_ids must be token ids, such as [2, 13], not 'a'"),
        ({"stop_token_ids": [5, -1]}, "stop_token_ids must be token ids of 0 or more, not [5, -1]"),
        ({"logit_bias": [5]}, "logit_bias must give numbers by token id, such as {2: -100}, not [5]"),
        ({"logit_bias": {"a": 1}}, "logit_bias must give numbers by token id, such as {2: -100}, not {'a': 1}"),
        (
            {"logit_bias": {5: 101}},
            "logit_bias must give token ids of 0 or more a number from -100 to 100, not 101 to 5",
        ),
        ({"n": 0}, "n must be 1 or more samples of each prompt, not 0"),
        ({"best_of": 2}, "'best_of' is no option of SamplingParams: here it is n"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20, how many of the likeliest tokens, or None, not 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be from 0 to 20"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_would_be_right(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        SamplingParams(**settings)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"stop": "abc"}, {"stop": ("abc",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": None}, {"stop": ()}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"stop_token_ids": 5}, {"stop_token_ids": (5,)}),
        ({"stop_token_ids": None}, {"stop_token_ids": ()}),
        ({"logit_bias": {"5": 1, 6: -2.5}}, {"logit_bias": {5: 1.0, 6: -2.5}}),
        ({"logit_bias": {}}, {"logit_bias": None}),
        ({"max_tokens": None}, {"max_tokens": None}),
    ],
)
def test_other_libraries_forms_are_taken(settings: dict[str, Any], kept: dict[str, Any]) -> None:
    params = SamplingParams(**settings)
    assert {name: getattr(params, name) for name in kept} == kept
    assert pickle.loads(pickle.dumps(params)) == dataclasses.replace(params) == params


def test_the_docstring_lists_what_is_not_taken() -> None:
    assert set(SamplingParams.NOT_TAKEN) <= set(re.findall(r"\w+", str(SamplingParams.__doc__)))


def test_parameters_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(("prompt", "new", "most"), [(1, 1, 1), (5, 1, 5), (5, 3, 7)])
def test_request_keeps_all_but_its_last_token(prompt: int, new: int, most: int) -> None:
    request = Request(0, tuple(range(prompt)), SamplingParams(max_tokens=new), seed=0)
    assert request.max_kv_tokens == most
    assert replace(request, encoded=True).max_kv_tokens == most + 1  # the decoder's own first token


# arrives at 100 ms, prefill starts at 150 ms, decode at 215 ms, tokens at 200, 230, 240 and 300 ms
WORKED = make_output(arrival=100, prefill=150, decode=215, tokens=(200, 230, 240, 300)).metrics
SINGLE = make_output(arrival=100, prefill=150, tokens=(200,)).metrics


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("queue_ms", 50),
        ("ttft_ms", 100),
        ("handoff_ms", 15),
        ("e2el_ms", 200),
        ("tpot_ms", 100 / 3),
        ("itl_ms", [30, 10, 60]),
    ],
)
def test_time_of_a_worked_request(name: str, value: float | list[float]) -> None:
    assert getattr(WORKED, name) == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "value"), [("ttft_ms", 100), ("e2el_ms", 100), ("tpot_ms", None), ("itl_ms", []), ("handoff_ms", None)]
)
def test_time_of_a_request_of_one_token(name: str, value: float | list[float] | None) -> None:
    assert getattr(SINGLE, name) == value


def test_times_add_up() -> None:
    assert WORKED.ttft_ms + sum(WORKED.itl_ms) == pytest.approx(WORKED.e2el_ms)


def test_requests_do_not_share_their_times() -> None:
    RequestMetrics(0).token_ns.append(5)
    assert RequestMetrics(0).token_ns == []


def test_outputs_have_the_shape_of_vllms() -> None:
    output = make_output(tokens=(1, 2, 3), text="some words", reason="stop")
    (completion,) = output.outputs
    assert (completion.index, completion.text, completion.finish_reason) == (0, "some words", "stop")
    assert completion.token_ids == output.token_ids
    assert output.finished


def test_a_prompts_samples_are_its_outputs() -> None:
    first, second = make_output(text="a"), make_output(text="b", cancelled=9)
    second.sample = 1
    first.others.append(second)
    assert [(each.index, each.text, each.finish_reason) for each in first.outputs] == [
        (0, "a", "length"),
        (1, "b", "cancelled"),
    ]


LONG = make_output(tokens=tuple(range(100, 1100)), prompt_tokens=3000, text="a long text of many words " * 99)


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        (
            LONG,
            "RequestOutput(request_id=0, prompt_tokens=3000, tokens=1000, text='a long text of ma...ext of many words ', "
            "finish_reason='length')",
        ),
        (WORKED, "RequestMetrics(tokens=4, queue_ms=50.0, ttft_ms=100.0, tpot_ms=33.3, e2el_ms=200.0)"),
        (SINGLE, "RequestMetrics(tokens=1, queue_ms=50.0, ttft_ms=100.0, e2el_ms=100.0)"),
        (RequestMetrics(5), "RequestMetrics(no token yet)"),
        (
            Request(3, (1,) * 2000, SamplingParams(max_tokens=7), seed=0, arrival_s=0.5),
            "Request(request_id=3, prompt_tokens=2000, max_tokens=7, arrival_s=0.5)",
        ),
    ],
)
def test_shown_in_one_line(shown: object, line: str) -> None:
    assert repr(shown) == line
