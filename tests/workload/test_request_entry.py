"""Requests as files write them, one a line: what each gives, and the line that each wrong one gets."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from splitwiser.request import SamplingParams
from splitwiser.workload.planned import PlannedRequest
from splitwiser.workload.reports import Report
from splitwiser.workload.request_entry import Sampling, read_request_lines
from tests.support.assertions import assert_says, refusal

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who wrote Hamlet?"}]


def write(directory: Path, *lines: Any) -> Path:
    path = directory / "requests.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines), encoding="utf-8")
    return path


def test_a_line_is_a_prompt_or_a_chat_with_its_own_parameters(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "größe", "max_tokens": 3, "stop": "."},
        "",
        {"messages": CHAT, "max_tokens": 5, "arrival_s": 0.5, "temperature": 1, "seed": 7},
        {"prompt": [4, 5], "max_tokens": 1},
        {"prompt": [6], "max_tokens": 9, "priority": -2, "ttft_target_ms": 250, "predicted_tokens": 4},
    )
    assert read_request_lines(path) == [
        PlannedRequest("größe", 0, 3, 0.0, Report("größe"), {"stop": "."}),
        PlannedRequest({"messages": CHAT}, 0, 5, 0.5, Report("Who wrote Hamlet?"), {"temperature": 1.0, "seed": 7}),
        PlannedRequest((4, 5), 0, 1),
        PlannedRequest((6,), 0, 9, priority=-2, ttft_target_ms=250.0, predicted_tokens=4),
    ]


def test_a_first_line_without_a_prompt_holds_for_all(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"max_tokens": 8, "top_p": 0.9}, {"prompt": "a"}, {"prompt": "b", "max_tokens": 2, "top_p": 0.5}
    )
    assert [(each.new_tokens, dict(each.sampling)) for each in read_request_lines(path)] == [
        (8, {"top_p": 0.9}),
        (2, {"top_p": 0.5}),
    ]


def test_a_request_may_say_which_tokens_it_wants(tmp_path: Path) -> None:
    own = {"logit_bias": {"5": -2.0}, "stop_token_ids": [0, 7], "min_tokens": 30, "frequency_penalty": 0.5}
    (request,) = read_request_lines(write(tmp_path, {"prompt": "a", "max_tokens": 40, **own}))
    assert request.sampling == own
    assert SamplingParams(max_tokens=40, **request.sampling).logit_bias == {5: -2.0}


def test_adapters_are_named_for_all_lines_or_one(tmp_path: Path) -> None:
    path = write(tmp_path, {"max_tokens": 4, "adapter": "a"}, {"prompt": "x"}, {"prompt": "y", "adapter": "none"})
    assert [each.adapter for each in read_request_lines(path)] == ["a", "none"]


def test_every_sampling_parameter_can_be_given() -> None:
    assert {each.name for each in fields(Sampling)} == {each.name for each in fields(SamplingParams)}


FINE = {"prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON: "),
        ("[1]", "must be an object with 'prompt' or 'messages'"),
        ({"prompt": "a"}, "its number of new tokens, 'max_tokens', is missing"),
        ({**FINE, "messages": CHAT}, "needs 'prompt' or 'messages', and one of them alone"),
        ({**FINE, "prompt": ""}, "'prompt' must be text or a list of token ids, and not empty, not ''"),
        ({**FINE, "temprature": 1}, "unknown key 'temprature'; did you mean temperature?"),
        ({**FINE, "best_of": 2}, "'best_of' is not taken: here it is n"),
        ({**FINE, "max_new_tokens": 2}, "'max_new_tokens' is not taken: here it is max_tokens"),
        ({**FINE, "max_tokens": 0}, "'max_tokens' must be a whole number of 1 or more, not 0"),
        ({**FINE, "top_p": 1.5}, "top_p must be above 0 and at most 1, not 1.5"),
        ({**FINE, "top_k": 1.5}, "'top_k' must be a whole number, not 1.5"),
        ({**FINE, "min_tokens": -1}, "'min_tokens' must be a whole number of 0 or more, not -1"),
        ({**FINE, "repetition_penalty": 0}, "repetition_penalty must be above 0, or 1 for none, not 0.0"),
        ({**FINE, "stop_token_ids": 5}, "'stop_token_ids' must be a list of token ids, not 5"),
        ({**FINE, "logit_bias": {"5": "a"}}, "'logit_bias' must be an object of numbers by token id, not "),
        ({**FINE, "logit_bias": {"a": 1}}, "logit_bias must give numbers by token id"),
        ({**FINE, "stop": [""]}, "stop must be a string or a sequence of strings"),
        ({**FINE, "stop": 5}, "'stop' must be text or a list of texts, not 5"),
        ({**FINE, "ignore_eos": 1}, "'ignore_eos' must be true or false, not 1"),
        ({**FINE, "arrival_s": -1}, "'arrival_s' must be 0 or more seconds, not -1"),
        ({**FINE, "priority": 0.5}, "'priority' must be a whole number, not 0.5"),
        ({**FINE, "ttft_target_ms": 0}, "'ttft_target_ms' must be more than 0 milliseconds, not 0"),
        ({**FINE, "predicted_tokens": 0}, "'predicted_tokens' must be a whole number of 1 or more, not 0"),
        ({**FINE, "prompt": "b \ud83d"}, "character 3 is half of a surrogate pair"),
        ({"messages": "hello", "max_tokens": 2}, "'messages' must be a list of messages, not 'hello'"),
        ({"messages": [], "max_tokens": 2}, "a chat needs at least one message"),
        ({"messages": [{"role": "user"}], "max_tokens": 2}, "message 0 must have 'role' and 'content' alone"),
        ({"messages": [{**CHAT[0], "content": []}], "max_tokens": 2}, "message 0: its content must be text, not []"),
    ],
)
def test_a_wrong_line_is_named_with_its_field(line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, FINE, line)
    assert_says(refusal(read_request_lines, path), f"--workload {path}, line 2: {message}")


@pytest.mark.parametrize("lines", [[], [{"max_tokens": 3}]])
def test_a_file_without_requests_is_refused(lines: list[Any], tmp_path: Path) -> None:
    path = write(tmp_path, *lines)
    assert refusal(read_request_lines, path) == f"--workload {path}: no requests in it; at least one is needed"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(read_request_lines, tmp_path / "no.jsonl") == f"--workload {tmp_path}/no.jsonl: no such file"
