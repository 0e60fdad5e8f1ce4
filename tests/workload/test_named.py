"""Workloads by name: the shipped ones, what overrides them, and what a file of one may say."""

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from splitwiser import constants
from splitwiser.config import RunConfig
from splitwiser.files import named_configs
from splitwiser.workload.job import prepare_job
from tests.support.assertions import assert_says, refusal


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a workload ``own``, the only one there is."""
    monkeypatch.setattr(constants, "DIR_CONFIGS", tmp_path)
    (tmp_path / "workloads").mkdir()
    return tmp_path / "workloads" / "own.yaml"


def test_the_shipped_ones_are_these() -> None:
    assert list(named_configs("workloads")) == ["long_outputs", "long_prompts", "single", "standard"]


@pytest.mark.parametrize(
    ("name", "requests", "middle", "new_tokens", "max_concurrency"),
    [
        ("standard", 64, 200, 64, None),
        ("long_prompts", 16, 1500, 16, None),
        ("long_outputs", 48, 32, 256, None),
        ("single", 6, 128, 128, 1),
    ],
)
def test_a_shipped_one_has_its_shape(
    name: str, requests: int, middle: int, new_tokens: int, max_concurrency: int | None
) -> None:
    config = RunConfig(workload=name)
    job = prepare_job(config, config.seed)
    assert (job.label, config.max_concurrency) == (name, max_concurrency)
    assert [each.new_tokens for each in job.requests] == [new_tokens] * requests
    lengths = [each.prompt_tokens for each in job.requests]
    assert median(lengths) == pytest.approx(middle, rel=0.2)
    assert max(lengths) + new_tokens <= 2048  # OPT's positions
    assert all(params.ignore_eos for params in job.sampling_params(config))


def test_given_options_override_the_workloads_own() -> None:
    config = RunConfig(workload="standard", requests=3, prompt_tokens="20")
    assert [(each.prompt_tokens, each.new_tokens) for each in prepare_job(config, 0).requests] == [(20, 64)] * 3


def test_a_recorded_configuration_makes_the_same_one_again(own: Path) -> None:
    own.write_text("{prompt_tokens: 9, requests: 2}")
    config = RunConfig(workload="own")
    own.write_text("{prompt_tokens: 10, requests: 3}")  # which changes nothing of what was recorded
    recorded = asdict(config)
    assert (recorded["workload"], recorded["prompt_tokens"], recorded["requests"]) == ("own", "9", 2)
    assert RunConfig(**recorded) == config


def test_a_name_that_is_none_is_refused_with_those_there_are() -> None:
    message = refusal(prepare_job, RunConfig(workload="standart"), 0)
    assert_says(message, "--workload standart: no such file", "long_outputs, long_prompts, single, standard")


def test_a_trace_is_not_given_beside_a_name() -> None:
    assert_says(refusal(RunConfig, workload="standard", trace="t.csv"), "--workload and --trace")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("[1]", ["own.yaml: must map options to values", "prompt_tokens"]),
        ("{requests: 3}", ["own.yaml: must map options to values", "prompt_tokens"]),
        ("{prompt_tokens: 9, temperature: 1}", ["own.yaml: unknown option 'temperature'", "requests"]),
        ("{prompt_tokens: 9, requests: many}", ["--workload own: ", "requests must be a whole number, not 'many'"]),
    ],
)
def test_a_wrong_file_is_named(content: str, parts: list[str], own: Path) -> None:
    own.write_text(content)
    options: dict[str, Any] = {"workload": "own"}
    message = refusal(lambda: RunConfig(**options))
    assert_says(message, *parts)
