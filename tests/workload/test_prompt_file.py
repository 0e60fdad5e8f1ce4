"""Workload files: what they give, and the line that each wrong one gets."""

import json
from pathlib import Path
from typing import Any

import pytest

from splitwiser.workload.planned import PlannedRequest
from splitwiser.workload.prompt_file import read_prompt_file
from splitwiser.workload.reports import Report
from tests.support.assertions import assert_says, refusal


def write(directory: Path, content: Any) -> Path:
    path = directory / "load.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_prompts_may_be_text_or_token_ids(tmp_path: Path) -> None:
    path = write(tmp_path, {"max_new_tokens": 7, "prompts": ["größe", [5, 0, 9]], "arrival_s": [0.25, 3]})
    assert read_prompt_file(path) == [
        PlannedRequest("größe", 0, 7, 0.25, Report("größe")),
        PlannedRequest((5, 0, 9), 0, 7, 3.0),
    ]


def test_each_prompt_may_have_its_own_limit(tmp_path: Path) -> None:
    path = write(tmp_path, {"max_new_tokens": [3, 9], "prompts": ["a", [1]]})
    assert [each.new_tokens for each in read_prompt_file(path)] == [3, 9]


def test_the_limit_of_all_has_the_name_of_the_sampling_parameter_too(tmp_path: Path) -> None:
    path = write(tmp_path, {"max_tokens": 3, "prompts": ["a", {"prompt": "b", "max_tokens": 9}]})
    assert [each.new_tokens for each in read_prompt_file(path)] == [3, 9]


def test_a_request_may_have_parameters_of_its_own_and_the_file_some_for_all(tmp_path: Path) -> None:
    own = {"prompt": "b", "max_tokens": 9, "temperature": 0.5, "arrival_s": 2, "ignore_eos": False}
    path = write(tmp_path, {"max_new_tokens": 3, "top_k": 4, "ignore_eos": True, "prompts": ["a", own]})
    assert read_prompt_file(path) == [
        PlannedRequest("a", 0, 3, 0.0, Report("a"), {"top_k": 4, "ignore_eos": True}),
        PlannedRequest("b", 0, 9, 2.0, Report("b"), {"top_k": 4, "ignore_eos": False, "temperature": 0.5}),
    ]


def test_requests_arrive_at_once_without_times(tmp_path: Path) -> None:
    path = write(tmp_path, {"max_new_tokens": 1, "prompts": ["a", "b", "c"]})
    assert [each.arrival_s for each in read_prompt_file(path)] == [0.0, 0.0, 0.0]


def test_arrivals_need_no_order(tmp_path: Path) -> None:
    path = write(tmp_path, {"max_new_tokens": 1, "prompts": ["a", "b"], "arrival_s": [2, 1]})
    assert [each.arrival_s for each in read_prompt_file(path)] == [2.0, 1.0]


@pytest.mark.parametrize(("given", "each"), [("a", ["a", "a"]), (["a", None], ["a", None]), (None, [None, None])])
def test_adapters_are_named_for_all_or_each(given: object, each: list[str | None], tmp_path: Path) -> None:
    path = write(tmp_path, {"max_new_tokens": 1, "prompts": ["a", "b"], "adapter": given})
    assert [request.adapter for request in read_prompt_file(path)] == each


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    assert refusal(read_prompt_file, path) == f"--workload {path}: no such file"


@pytest.mark.parametrize("content", ["", "{", "{'prompts': []}", "[1,]", "prompts"])
def test_broken_json_is_named(content: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    assert_says(refusal(read_prompt_file, path), f"--workload {path}: not valid JSON: ", "line 1")


def test_half_of_a_surrogate_pair_is_named_by_its_prompt(tmp_path: Path) -> None:
    path = write(tmp_path, {"max_new_tokens": 1, "prompts": ["a", "b \ud83d"]})
    assert_says(refusal(read_prompt_file, path), f"--workload {path}: prompt 1: character 3", "U+D83D")


def test_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_bytes(b'{"prompts": ["\xff"]}')
    assert_says(refusal(read_prompt_file, path), f"--workload {path}: not valid JSON: ")


def test_directory_is_named(tmp_path: Path) -> None:
    assert_says(refusal(read_prompt_file, tmp_path), f"--workload {tmp_path}: ", "directory")


FINE = {"max_new_tokens": 4, "prompts": ["a", [1, 2]]}
NEW_TOKENS = "'max_new_tokens' must be a whole number of 1 or more, not "
PROMPT = "must be text, a list of token ids or a request, and not empty, not "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([FINE], "must be an object with 'max_new_tokens' and 'prompts'"),
        (
            {**FINE, "arrivals": []},
            "unknown key 'arrivals'; did you mean arrival_s?",
        ),
        ({"prompts": ["a"]}, "prompt 0: its number of new tokens, 'max_tokens', is missing"),
        ({**FINE, "max_tokens": 3}, "'max_tokens' and 'max_new_tokens' say the same; give one of them"),
        (
            {**FINE, "typical_p": 0.1},
            "'typical_p' is not taken: tokens are drawn by temperature, top_k, top_p and min_p alone",
        ),
        ({**FINE, "temperature": "hot"}, "'temperature' must be a number, not 'hot'"),
        ({**FINE, "temperature": -1}, "temperature must be 0 (greedy) or more, not -1.0"),
        ({**FINE, "max_new_tokens": 0}, f"{NEW_TOKENS}0"),
        ({**FINE, "max_new_tokens": True}, f"{NEW_TOKENS}True"),
        ({**FINE, "max_new_tokens": 2.0}, f"{NEW_TOKENS}2.0"),
        ({**FINE, "max_new_tokens": "4"}, f"{NEW_TOKENS}'4'"),
        ({**FINE, "max_new_tokens": [4, 0]}, "'max_new_tokens', entry 1 must be a whole number of 1 or more, not 0"),
        (
            {**FINE, "max_new_tokens": [4, None]},
            "'max_new_tokens', entry 1 must be a whole number of 1 or more, not None",
        ),
        (
            {**FINE, "max_new_tokens": [4]},
            "'max_new_tokens' has 1 entries for 2 prompts; give one each",
        ),
        ({"max_new_tokens": 4}, "'prompts' is missing"),
        ({**FINE, "prompts": []}, "'prompts' must be a list with at least one prompt, not []"),
        ({**FINE, "prompts": "a"}, "'prompts' must be a list with at least one prompt, not 'a'"),
        ({**FINE, "prompts": ["a", ""]}, f"'prompts', entry 1 {PROMPT}''"),
        ({**FINE, "prompts": [[]]}, f"'prompts', entry 0 {PROMPT}[]"),
        ({**FINE, "prompts": [None]}, f"'prompts', entry 0 {PROMPT}None"),
        ({**FINE, "prompts": [7]}, f"'prompts', entry 0 {PROMPT}7"),
        ({**FINE, "prompts": [{}]}, f"'prompts', entry 0 {PROMPT}{{}}"),
        ({**FINE, "prompts": ["b", {"seed": 1}]}, "prompt 1: needs 'prompt' or 'messages', and one of them alone"),
        ({**FINE, "prompts": [[1, 2.0]]}, f"'prompts', entry 0 {PROMPT}[1, 2.0]"),
        ({**FINE, "prompts": [[1, True]]}, f"'prompts', entry 0 {PROMPT}[1, True]"),
        ({**FINE, "prompts": [[1, "2"]]}, f"'prompts', entry 0 {PROMPT}[1, '2']"),
        ({**FINE, "prompts": [[[1, 2]]]}, f"'prompts', entry 0 {PROMPT}[[1, 2]]"),
        ({**FINE, "arrival_s": [0]}, "'arrival_s' has 1 entries for 2 prompts; give one each"),
        ({**FINE, "arrival_s": 0}, "'arrival_s' must be a valid list, not 0"),
        ({**FINE, "arrival_s": [0, -0.5]}, "'arrival_s', entry 1 must be 0 or more seconds, not -0.5"),
        ({**FINE, "arrival_s": ["0", 0]}, "'arrival_s', entry 0 must be 0 or more seconds, not '0'"),
        ({**FINE, "arrival_s": [float("nan"), 0]}, "'arrival_s', entry 0 must be 0 or more seconds, not nan"),
        ({**FINE, "arrival_s": [0, float("inf")]}, "'arrival_s', entry 1 must be 0 or more seconds, not inf"),
        ({**FINE, "arrival_s": [0, True]}, "'arrival_s', entry 1 must be 0 or more seconds, not True"),
    ],
)
def test_wrong_content_is_named_with_its_field(content: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    assert refusal(read_prompt_file, path) == f"--workload {path}: {message}"


def test_arrival_too_large_for_a_float_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {**FINE, "arrival_s": [0, 10**400]})
    assert_says(refusal(read_prompt_file, path), f"--workload {path}: 'arrival_s', entry 1 ")
