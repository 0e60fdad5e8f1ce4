"""Which of a checkpoint's generation settings are sampling parameters, and what is said of the others."""

from typing import Any

import pytest
from transformers import GenerationConfig

from splitwiser.model.generation_settings import describe_own_sampling, own_sampling, unapplied_settings


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.0, "eos_token_id": 2}, {}),
        ({"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.1}),
        (
            {"do_sample": True, "temperature": 0.7, "min_p": 0.05},
            {"temperature": 0.7, "top_k": 50, "top_p": 1.0, "min_p": 0.05},  # 50 is transformers' own default
        ),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    ],
)
def test_own_sampling_is_what_generate_would_do(settings: dict[str, Any], own: dict[str, Any]) -> None:
    assert own_sampling(GenerationConfig(**settings)) == own


def test_settings_that_no_mode_applies_are_named() -> None:
    settings = GenerationConfig(repetition_penalty=1.2, do_sample=True, suppress_tokens=[5], no_repeat_ngram_size=3)
    (note,) = unapplied_settings(settings)
    assert note.endswith("not applied, in any mode: no_repeat_ngram_size=3, suppress_tokens=[5]")
    assert unapplied_settings(GenerationConfig(repetition_penalty=1.2)) == []


def test_a_model_without_settings_says_nothing() -> None:
    assert (own_sampling(None), unapplied_settings(None), describe_own_sampling({}, "none")) == ({}, [], [])
