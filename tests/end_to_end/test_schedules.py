"""No schedule changes a token: those of ``model.generate`` on one prompt alone, whatever shares a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitwiser import LLM, SamplingParams
from splitwiser.engine.schedule import SCHEDULES
from tests.support.tokens import DISPATCHED, LENGTHS, SERVED, prompts_of, references, room_for

STAGGERED = [0.01 * (number % 3) for number in range(len(LENGTHS))]


@pytest.mark.parametrize("budget", [1, 7, 64, 2048])
@pytest.mark.parametrize("name", SERVED)
def test_hybrid_steps_of_any_budget(name: str, budget: int, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS)
    with LLM(tiny(name), schedule="hybrid", prefill_tokens=budget) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24), arrival_s=STAGGERED)
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 24)


@pytest.mark.parametrize(
    ("name", "options", "measured"),
    [
        ("llama", {}, ["mixed-0"]),
        ("t5", {}, ["mixed-0"]),
        ("opt", {"mode": "mp", "workers": [{"role": "mixed", "count": 2}]}, ["mixed-0", "mixed-1"]),
        ("opt", {"prefill_tokens": 2048}, []),
        ("opt", {"itl_target_ms": 30}, []),
    ],
)
def test_without_a_budget_workers_measure_their_own(
    name: str, options: dict[str, Any], measured: list[str], tiny: Callable[[str], Path]
) -> None:
    prompts = prompts_of(LENGTHS)
    with LLM(tiny(name), schedule="hybrid", **options) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24))
        found = {key: text for key, text in llm.started.kernels.items() if key.endswith("_budget")}
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 24)
    assert sorted(found) == [f"{worker}_budget" for worker in measured]
    assert all(256 <= int(text.split()[0]) <= 2048 for text in found.values())


@pytest.mark.parametrize("name", [*DISPATCHED, "deepseek_v3", "minicpm3", "t5", "bart"])
def test_hybrid_steps_of_other_models(name: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS)
    with LLM(tiny(name), schedule="hybrid", prefill_tokens=24) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24), arrival_s=STAGGERED)
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 24)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_with_waiting_requests(schedule: str, kernels: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS, seed=1)
    options: dict[str, Any] = {"prefill_tokens": 24, "kernels": kernels, "kv_memory": room_for(tiny("mistral"), 144)}
    with LLM(tiny("mistral"), schedule=schedule, **options) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24))
    assert [output.token_ids for output in outputs] == references(tiny("mistral"), prompts, 24)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "budget"), [(1, 2048), (2, 1), (2, 7), (2, 64)])
def test_hybrid_steps_in_processes(count: int, budget: int, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS)
    workers = [{"role": "mixed", "count": count}]
    with LLM(tiny("gemma2"), mode="mp", workers=workers, schedule="hybrid", prefill_tokens=budget) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24), arrival_s=STAGGERED)
    assert [output.token_ids for output in outputs] == references(tiny("gemma2"), prompts, 24)


def test_log_probabilities_of_hybrid_steps_are_those_of_steps_of_one_phase(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([20, 1, 33, 9, 30])
    asked: list[dict[str, Any]] = [
        {"logprobs": 1, "prompt_logprobs": 0},
        {},
        {"prompt_logprobs": 0},
        {"logprobs": 1},
        {},
    ]
    params = [SamplingParams(max_tokens=9, ignore_eos=True, **each) for each in asked]
    made = []
    for schedule in ("alternate", "hybrid"):
        with LLM(tiny("llama"), schedule=schedule, prefill_tokens=8) as llm:
            outputs = llm.generate(prompts, params)
        places = [each for output in outputs for each in (*(output.logprobs or ()), *(output.prompt_logprobs or ()))]
        made.append([(token, choice.rank, choice.logprob) for each in places if each for token, choice in each.items()])
    assert [each[:2] for each in made[0]] == [each[:2] for each in made[1]]
    assert [each[2] for each in made[0]] == pytest.approx([each[2] for each in made[1]], abs=1e-4)
    assert len(made[0]) == 2 * 9 + 19 + 32
