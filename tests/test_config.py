"""A run's configuration: its defaults, what it derives and what it refuses."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from splitwiser.config import RunConfig
from splitwiser.options import option_type
from splitwiser.request import SamplingParams
from tests.support.assertions import assert_says, refusal


@pytest.mark.parametrize("name", [field.name for field in fields(RunConfig) if field.default is not None])
def test_default_is_of_the_type_an_option_gives(name: str) -> None:
    (field,) = (each for each in fields(RunConfig) if each.name == name)
    assert type(field.default) is option_type(field)


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        ({}, "auto"),
        ({"device": "cpu"}, "cpu"),
        ({"gpu_id": 0}, "cuda:0"),
        ({"gpu_id": 3}, "cuda:3"),
        ({"gpu_id": 1, "device": "cuda:1"}, "cuda:1"),
    ],
)
def test_device_and_gpu_id_name_a_device(settings: dict[str, Any], device: str) -> None:
    assert RunConfig(**settings).device_name == device


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "--limit must be 1 or more, not 0"),
        ({"limit": -2}, "--limit must be 1 or more, not -2"),
        (
            {"requests": 99_999_999_999, "prompt_tokens": "5"},
            "--requests must be 10,000,000 or less, not 99,999,999,999",
        ),
        ({"gpu_id": 0, "device": "cpu"}, "--gpu_id 0 and --device cpu disagree; give one of them"),
        ({"gpu_id": 1, "device": "cuda:0"}, "--gpu_id 1 and --device cuda:0 disagree; give one of them"),
    ],
)
def test_values_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    assert refusal(RunConfig, **settings) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"request_rate": 0.0}, "--request_rate must be above 0 requests per second, not 0"),
        ({"request_rate": float("nan")}, "--request_rate must be above 0 requests per second, not nan"),
        ({"request_rate": 1.0, "burstiness": 0.0}, "--burstiness must be above 0, not 0"),
        ({"burstiness": 2.0}, "--burstiness applies to arrivals at a rate; give --request_rate"),
        ({"max_concurrency": 0}, "--max_concurrency must be 1 or more, not 0"),
        ({"requests": 0, "prompt_tokens": "5"}, "--requests must be 1 or more, not 0"),
        ({"max_prompt_tokens": 0, "prompt_tokens": "5"}, "--max_prompt_tokens must be 1 or more, not 0"),
        ({"trace": "t", "trace_speed": 0.0}, "--trace_speed must be above 0, not 0"),
        ({"trace": "t", "trace_speed": float("inf")}, "--trace_speed must be above 0, not inf"),
        ({"workload": "w", "trace": "t"}, "--workload and --trace both set the prompts; give one of them"),
        (
            {"workload": "w", "prompt_tokens": "5"},
            "--workload and --prompt_tokens both set the prompts; give one of them",
        ),
    ],
)
def test_loads_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    assert refusal(RunConfig, **settings) == message


@pytest.mark.parametrize(
    "settings",
    [
        {"max_concurrency": 4, "request_rate": 2.0},
        {"trace": "t", "trace_speed": 2.0, "request_rate": 2.0},
        {"trace": "t", "trace_speed": 2.0, "max_concurrency": 2},
        {"trace_slice": "0:5"},
        {"trace_speed": 2.0},
        {"requests": 5},
        {"requests": 5, "workload": "w"},
        {"requests": 5, "trace": "t", "prompt_tokens": "5"},
        {"max_prompt_tokens": 5},
        {"max_prompt_tokens": 5, "workload": "w"},
        {"trace": "t", "trace_slice": "5"},
        {"prompt_tokens": "x"},
        {"output_tokens": "x"},
        {"goodput": "fast"},
    ],
)
def test_options_that_would_do_nothing_or_are_misspelt_are_refused(settings: dict[str, Any]) -> None:
    option = max(
        settings, key=lambda name: name in ("trace_slice", "trace_speed")
    )  # the one at fault, where two are given
    assert f"--{option}" in refusal(RunConfig, **settings)


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({}, "case"),
        ({"workload": "w"}, "workload"),
        ({"trace": "t"}, "trace"),
        ({"trace": "t", "prompt_tokens": "5"}, "trace"),
        ({"prompt_tokens": "5"}, "synthetic"),
        ({"output_tokens": "5"}, "case"),
    ],
)
def test_source_of_the_requests(settings: dict[str, Any], source: str) -> None:
    assert RunConfig(**settings).source == source


def test_exact_requests_make_just_as_many_tokens() -> None:
    params = RunConfig(max_new_tokens=5).sampling_params(3, exact=True)
    assert (params.max_tokens, params.ignore_eos) == (3, True)


def test_results_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "results").touch()
    message = refusal(RunConfig, results=str(tmp_path / "results"))
    assert message == f"--results {tmp_path / 'results'}: is a file; a directory is needed"


def test_results_must_be_named() -> None:
    assert refusal(RunConfig, results="") == "--results is empty; a directory is needed, or . for the current one"


@pytest.mark.parametrize("name", [".", "new", "new/and/deep"])
def test_results_may_exist_or_not(name: str, tmp_path: Path) -> None:
    assert RunConfig(results=str(tmp_path / name)).results == str(tmp_path / name)


@pytest.mark.parametrize(("given", "expected"), [(None, 200), (7, 7)])
def test_option_goes_before_the_cases_new_tokens(given: int | None, expected: int) -> None:
    assert RunConfig(max_new_tokens=given).sampling_params(200).max_tokens == expected


def test_options_become_sampling_parameters() -> None:
    same: dict[str, Any] = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 0.5,
        "frequency_penalty": -1.0, "min_tokens": 4, "ignore_eos": True,
    }  # fmt: skip
    config = RunConfig(**same, stop_token_ids="[0, 7]", logit_bias='{"5": -2}')
    expected = SamplingParams(max_tokens=9, **same, stop_token_ids=(0, 7), logit_bias={5: -2})
    assert config.sampling_params(9) == expected
    assert RunConfig(stop_token_ids="7").sampling_params(9).stop_token_ids == (7,)


def test_zero_new_tokens_are_refused_and_not_replaced() -> None:
    assert refusal(RunConfig, max_new_tokens=0) == "--max_new_tokens must be 1 or more, not 0"


def test_a_case_takes_the_adapter_that_comes_with_the_model() -> None:
    assert RunConfig(case_id=200).default_adapter == "lora"
    assert RunConfig(case_id=100).default_adapter == "prefix"
    assert RunConfig(case_id=0).default_adapter == "none"


def test_what_is_asked_of_adapters_holds_for_the_one_of_the_case_too() -> None:
    assert RunConfig(case_id=200, merge_adapter=True).adapters == "lora"
    assert RunConfig(case_id=100, use_adapter="prefix").adapters == "prefix"
    assert_says(refusal(RunConfig, case_id=200, backend="vllm"), "--adapters does not go with backend vllm")


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"case_id": 200, "model": "opt-125m"}, "model opt-125m runs without one"),
        ({"case_id": 100, "adapters": "lora"}, "adapter lora is LoRA"),
        ({"case_id": 100, "adapters": "lora,prefix"}, "model radiology-opt runs without one"),
        ({"case_id": 200, "adapters": "lora", "use_adapter": "none"}, "model radiology-opt runs without one"),
    ],
)
def test_a_case_of_adapters_needs_one_of_its_kind(settings: dict[str, Any], given: str) -> None:
    assert_says(refusal(RunConfig, **settings), "needs an adapter of that kind", given, "--adapter NAME=DIRECTORY")


@pytest.mark.parametrize(
    ("settings", "default"),
    [
        ({"adapters": "lora"}, "lora"),
        ({"adapters": "lora", "use_adapter": "none"}, "none"),
        ({"adapters": "lora,prefix"}, "none"),
        ({"adapters": "lora,prefix", "use_adapter": "prefix"}, "prefix"),
    ],
)
def test_the_only_adapter_is_the_default(settings: dict[str, Any], default: str) -> None:
    assert RunConfig(**settings).default_adapter == default


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"adapters": "lora", "use_adapter": "lra"},
            "unknown --use_adapter 'lra'; did you mean lora? known: lora, none",
        ),
        (
            {"adapters": "prefix", "merge_adapter": True},
            "--merge_adapter merges one LoRA adapter into the model; the adapters are: prefix (prefix tuning)",
        ),
        (
            {"merge_adapter": True},
            "--merge_adapter merges one LoRA adapter into the model; give one with --adapter",
        ),
        (
            {"adapters": "lora", "merge_adapter": True, "use_adapter": "none"},
            "--use_adapter none: a merged adapter runs with every request; leave --merge_adapter out",
        ),
    ],
)
def test_settings_of_adapters_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    assert refusal(RunConfig, **settings) == message


@pytest.mark.parametrize(
    ("settings", "caches"),
    [
        ({}, None),
        ({"case_id": 4}, True),
        ({"case_id": 4, "mode": "generate"}, None),
        ({"case_id": 4, "same_examples": True}, True),
        ({"case_id": 4, "same_examples": True, "prefix_caching": False}, False),
        ({"case_id": 4, "backend": "vllm"}, None),
        ({"case_id": 4, "same_examples": True, "backend": "vllm"}, True),
        ({"prompt_tokens": "5", "prefix_caching": True}, True),
    ],
)
def test_prefix_caching_is_on_for_in_context_examples(settings: dict[str, Any], caches: bool | None) -> None:
    assert RunConfig(**settings).prefix_caching is caches


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"same_examples": True}, "--same_examples: case 0 (null prompt) has no in-context examples"),
        (
            {"same_examples": True, "prompt_tokens": "5"},
            "--same_examples is for cases with in-context examples; give --case_id alone",
        ),
    ],
)
def test_examples_that_nobody_has_are_refused(settings: dict[str, Any], message: str) -> None:
    assert refusal(RunConfig, **settings) == message
