"""Mode ``generate``: which requests share a padded batch."""

from collections.abc import Callable
from pathlib import Path

import pytest

from splitwiser import LLM, SamplingParams
from splitwiser.placement.reference import ONE_LENGTH
from tests.support.models import POSITIONS, make_tiny
from tests.support.observers import Seen
from tests.support.tokens import prompts_of, references


def batches(seen: Seen) -> list[int]:
    """Requests of each batch, in order."""
    return [step.requests for step in seen.steps if step.phase == "prefill"]


def test_a_row_that_has_ended_takes_no_position_past_the_last(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([POSITIONS - 4, 6, 7])
    params = [SamplingParams(max_tokens=most, ignore_eos=True) for most in (4, 30, 30)]
    seen = Seen()
    with LLM(tiny("gpt2"), mode="generate") as llm:
        outputs = llm.generate(prompts, params, observer=seen)
    assert [len(output.token_ids) for output in outputs] == [4, 30, 30]
    assert batches(seen) == [1, 2]


def test_rows_that_fit_together_share_a_batch(tiny: Callable[[str], Path]) -> None:
    seen = Seen()
    with LLM(tiny("gpt2"), mode="generate") as llm:
        llm.generate(prompts_of([POSITIONS - 29, 6]), SamplingParams(max_tokens=30), observer=seen)
    assert batches(seen) == [2]


def test_lengths_do_not_mix_where_padding_changes_tokens(tmp_path: Path) -> None:
    directory = make_tiny("llama4_text", tmp_path)
    prompts = prompts_of([20, 5, 20, 40])
    seen = Seen()
    with LLM(directory, mode="generate") as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24), observer=seen)
        assert ONE_LENGTH in llm.model.notes
    assert [output.token_ids for output in outputs] == references(directory, prompts, 24)
    assert batches(seen) == [2, 1, 1]


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_padded_models_say_nothing_of_lengths(name: str, tiny: Callable[[str], Path]) -> None:
    with LLM(tiny(name), mode="generate") as llm:
        assert ONE_LENGTH not in llm.model.notes


def test_steps_count_the_tokens_that_come_of_them(tiny: Callable[[str], Path]) -> None:
    seen = Seen()
    params = [SamplingParams(max_tokens=most, ignore_eos=True) for most in (2, 5)]
    with LLM(tiny("opt"), mode="generate") as llm:
        llm.generate(prompts_of([6, 9]), params, observer=seen)
    assert [step.tokens for step in seen.steps] == [15, 2, 1, 1, 1]
