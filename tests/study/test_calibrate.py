"""What a run's steps are held against, and the factors that come of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from splitwiser import LLM, SamplingParams
from splitwiser.placement.layout import ONE_MIXED, ONE_OF_EACH
from splitwiser.study.calibrate import Recording, SizedStep, conditions_of, size_steps
from splitwiser.study.step_times import StepCosts
from tests.support.records import make_output, make_step

ONE = StepCosts((0.010, 0.001, 0, 0, 0), ((1, 0.020, 0),))  # 10 ms and 1 ms a token; 20 ms
TWO = StepCosts((0.005, 0.0005, 0, 0, 0), ((1, 0.010, 0),))


def prefill(start: int, end: int, tokens: int) -> SizedStep:
    step = make_step("prefill-0", "prefill", start, end, tokens=tokens, role="prefill")
    return SizedStep(step, chunks=((0, tokens),))


def decode(start: int, end: int) -> SizedStep:
    return SizedStep(make_step("decode-0", "decode", start, end, role="decode"), batch=1, context=5)


def test_steps_are_taken_apart_into_chunks_and_contexts() -> None:
    recording = Recording()
    # prompts of 3 and 5 tokens in steps of 4 and 4; the first decodes beside the second step
    for step in (
        make_step("mixed-0", "prefill", 0, 10, tokens=4),
        make_step("mixed-0", "decode", 10, 20),
        make_step("mixed-0", "prefill", 20, 30, tokens=4),
        make_step("mixed-0", "decode", 30, 40, requests=2),
    ):
        recording.on_step(step)
    first = make_output(0, prefill=0, tokens=(10, 20, 40), prompt_tokens=3)
    second = make_output(1, prefill=0, tokens=(30, 40), prompt_tokens=5)
    for output in (second, first):
        output.metrics.prefill_worker = output.metrics.decode_worker = "mixed-0"
        recording.on_output(output)
    sized = size_steps(recording)
    assert [step.chunks for step in sized] == [((0, 3), (0, 1)), (), ((1, 4),), ()]
    assert [(step.batch, step.context) for step in sized] == [(0, 0), (1, 4), (0, 0), (2, 5 + 6)]


def test_a_hybrid_step_is_taken_apart_and_counts_for_both_phases() -> None:
    recording = Recording()
    # prompts of 3 and 5 tokens; the first decodes beside the second's last 4
    recording.on_step(make_step("mixed-0", "prefill", 0, 10, tokens=4))
    recording.on_step(make_step("mixed-0", "hybrid", 10, 58, tokens=5, decode_tokens=1))
    for number, tokens, length in ((0, (10, 58), 3), (1, (58,), 5)):
        output = make_output(number, tokens=tokens, prompt_tokens=length)
        output.metrics.prefill_worker = output.metrics.decode_worker = "mixed-0"
        recording.on_output(output)
    hybrid = size_steps(recording)[1]
    assert (hybrid.chunks, hybrid.batch, hybrid.context) == (((1, 4),), 1, 4)
    assert hybrid.predicted(ONE) == pytest.approx(0.020)  # longer than 15 ms for the products of 5 tokens
    conditions = conditions_of([hybrid], {1: ONE}, ONE_MIXED, None, lend=True)
    assert [conditions.prefill_alone, conditions.decode_alone] == pytest.approx([2.4, 2.4])


@pytest.mark.parametrize("schedule", ["alternate", "hybrid"])
def test_a_real_runs_steps_are_all_sized(schedule: str, tiny: Callable[[str], Path]) -> None:
    recording = Recording()
    prompts = [list(range(1, 2 + (11 * n) % 50)) for n in range(12)]
    params = [SamplingParams(max_tokens=1 + n % 6, ignore_eos=True) for n in range(12)]
    with LLM(tiny("opt"), mode="sequential", kv_memory="2MiB", prefill_tokens=40, schedule=schedule) as llm:
        llm.generate(prompts, params, observer=recording)
    sized = size_steps(recording)
    assert len(sized) == len(recording.steps)
    for step in sized:
        assert sum(tokens for _, tokens in step.chunks) == step.record.tokens - step.record.decode_tokens
        assert step.batch == step.record.decode_tokens
        assert len(step.chunks) + step.batch == step.record.requests
    assert any(start for step in sized for start, _ in step.chunks)


def test_factors_of_steps_alone_and_beside() -> None:
    steps = [
        prefill(0, 30, tokens=5),  # 15 ms predicted: twice as long, alone
        prefill(100, 150, tokens=15),  # 25 ms predicted, beside the next two: twice
        decode(100, 125),  # 20 ms predicted, beside: 1.25
        decode(125, 150),
        decode(200, 220),  # alone: 1
    ]
    conditions = conditions_of(steps, {1: ONE}, ONE_OF_EACH, cores=None, lend=True)
    assert conditions.prefill_alone == pytest.approx(2)
    assert conditions.prefill_beside == pytest.approx(2)
    assert conditions.decode_beside == pytest.approx(1.25)
    assert conditions.decode_alone == pytest.approx(1)


def test_steps_that_are_beside_another_for_a_part_do_not_count() -> None:
    steps = [prefill(0, 100, tokens=5), decode(50, 80), decode(200, 220)]
    conditions = conditions_of(steps, {1: ONE}, ONE_OF_EACH, cores=None, lend=True)
    assert conditions.prefill_alone == 1  # none left to tell
    assert conditions.decode_beside == pytest.approx(1.5)


def test_a_lone_step_of_a_split_run_is_held_against_all_cores_where_they_are_lent() -> None:
    steps = [decode(0, 20), prefill(100, 115, tokens=5), decode(100, 115)]
    lent, kept = (conditions_of(steps, {1: ONE, 2: TWO}, ONE_OF_EACH, 2, lend) for lend in (True, False))
    assert [lent.decode_alone, kept.decode_alone] == pytest.approx([2, 1])
    assert lent.prefill_beside == kept.prefill_beside == pytest.approx(1)


def test_without_steps_side_by_side_those_alone_stand_in() -> None:
    conditions = conditions_of([prefill(0, 30, tokens=5)], {1: ONE}, ONE_OF_EACH, None, lend=True)
    assert [conditions.prefill_beside, conditions.decode_beside] == pytest.approx([2, 1])


def test_the_gap_is_the_median_between_a_workers_steps() -> None:
    def step(start: int, end: int) -> SizedStep:
        return SizedStep(make_step("mixed-0", "decode", start, end), batch=1, context=5)

    steps = [step(0, 20), step(22, 42), step(44, 64), step(500, 520)]
    assert conditions_of(steps, {1: ONE}, ONE_MIXED, None, lend=True).gap_s == pytest.approx(0.002)
