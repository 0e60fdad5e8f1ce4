"""The Python API."""

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import splitwiser
from splitwiser import LLM, EngineConfig, RunConfig, SamplingParams, constants
from splitwiser.engine.engine import Observer
from splitwiser.engine.messages import StepRecord
from splitwiser.errors import InputError, RunError
from splitwiser.options import option_fields
from splitwiser.workload.cases import get_case
from splitwiser.workload.reports import load_tok
from tests.support.assertions import assert_says, refusal
from tests.support.models import POSITIONS, VOCABULARY
from tests.support.observers import Seen
from tests.support.tokens import references, room_for

MODES = pytest.mark.parametrize("mode", ["sequential", "generate"])


@MODES
def test_text_in_and_out_with_the_embedded_model(mode: str) -> None:
    case = get_case(constants.CASES, 0)
    prompts = [case.prompt_text(report.finding) for report in load_tok(constants.DIR_DATA, "test")[:2]]
    with LLM(mode=mode) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=40))
    assert [output.prompt for output in outputs] == prompts
    assert all(output.text.strip() and "</s>" not in output.text for output in outputs)
    assert [output.finish_reason for output in outputs] == ["stop", "stop"]


@MODES
def test_outputs_are_in_the_order_of_the_prompts(mode: str, tiny: Callable[[str], Path]) -> None:
    prompts = [[3 + number] * (1 + number) for number in range(6)]
    params = [SamplingParams(max_tokens=6 - number, ignore_eos=True) for number in range(6)]  # the last ends first
    seen = Seen()
    with LLM(tiny("opt"), mode=mode) as llm:
        outputs = llm.generate(prompts, params, observer=seen)
    assert [output.prompt_token_ids for output in outputs] == [tuple(prompt) for prompt in prompts]
    assert [len(output.token_ids) for output in outputs] == [6, 5, 4, 3, 2, 1]
    assert sorted(output.request_id for output in seen.outputs) == list(range(6))


@MODES
def test_ends_at_end_of_sequence_unless_told_not_to(mode: str, tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode=mode) as llm:
        (free,) = llm.generate([[7, 8, 9]], SamplingParams(max_tokens=30, ignore_eos=True))
        llm.model.eos_token_ids = frozenset({free.token_ids[4]})  # as if that token ended sequences
        (stopped,) = llm.generate([[7, 8, 9]], SamplingParams(max_tokens=30))
        (ignored,) = llm.generate([[7, 8, 9]], SamplingParams(max_tokens=30, ignore_eos=True))
    first = free.token_ids.index(free.token_ids[4])
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: first + 1], "stop")
    assert (ignored.token_ids, ignored.finish_reason) == (free.token_ids, "length")


@MODES
def test_a_stop_string_ends_the_request_and_is_cut_off(mode: str) -> None:
    prompt = "### findings: there is a large left pleural effusion. ### impressions:"
    with LLM(mode=mode) as llm:
        (whole,) = llm.generate([prompt], SamplingParams(max_tokens=40))
        stop = whole.text[5:9]
        (cut, other) = llm.generate(
            [prompt, prompt], [SamplingParams(max_tokens=40, stop=(stop,)), SamplingParams(max_tokens=40)]
        )
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)
    assert other.text == whole.text


@MODES
def test_times_are_in_order_and_steps_account_for_every_token(mode: str, tiny: Callable[[str], Path]) -> None:
    seen = Seen()
    arrivals = [0.0, 0.0, 0.15]
    with LLM(tiny("llama"), mode=mode) as llm:
        outputs = llm.generate(
            [[5] * 20, [6] * 3, [7] * 9],
            SamplingParams(max_tokens=5, ignore_eos=True),
            arrival_s=arrivals,
            observer=seen,
        )
    for output in outputs:
        metrics = output.metrics
        moments = [metrics.arrival_ns, metrics.prefill_start_ns, *metrics.token_ns]
        assert moments == sorted(moments)
        assert len(metrics.token_ns) == len(output.token_ids)
    start_ns = outputs[0].metrics.arrival_ns
    assert [round((output.metrics.arrival_ns - start_ns) / 1e9, 6) for output in outputs] == arrivals
    assert sum(step.tokens for step in seen.steps if step.phase == "prefill") == 32
    assert sum(step.tokens for step in seen.steps if step.phase == "decode") == 3 * 4
    step_ends = {step.end_ns for step in seen.steps}
    assert {moment for output in outputs for moment in output.metrics.token_ns} <= step_ends
    assert all(step.start_ns < step.end_ns for step in seen.steps)


def test_runs_again_after_a_run(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt")) as llm:
        first = llm.generate([[4, 5, 6]], SamplingParams(max_tokens=5))
        second = llm.generate([[4, 5, 6]], SamplingParams(max_tokens=5))
    assert first[0].token_ids == second[0].token_ids


def test_dummy_weights_follow_the_seed(tiny: Callable[[str], Path]) -> None:
    tokens = []
    for seed in (1, 1, 2):
        with LLM(tiny("opt"), load_format="dummy", seed=seed) as llm:
            tokens.append(llm.generate([[4, 5, 6]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids)
    assert tokens[0] == tokens[1] != tokens[2]


def drawn(directory: Path, seed: int) -> list[list[int]]:
    """The tokens of two equal requests that have no seed of their own."""
    params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    with LLM(directory, seed=seed) as llm:
        return [output.token_ids for output in llm.generate([[4, 5, 6]] * 2, params)]


def test_requests_without_a_seed_draw_apart(tiny: Callable[[str], Path]) -> None:
    first, second = drawn(tiny("opt"), 0)
    assert first != second


def test_draws_follow_the_seed_of_the_llm(tiny: Callable[[str], Path]) -> None:
    made = [drawn(tiny("opt"), seed) for seed in (1, 1, 2)]
    assert made[0] == made[1]
    assert made[0][0] != made[2][0]


def test_an_option_that_changes_nothing_is_a_note_of_the_model(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="generate", max_batch=3) as llm:
        assert llm.model.notes == ["--max_batch changes nothing: mode generate runs transformers' own engine"]


def test_dummy_text_is_tokenised_without_a_download() -> None:
    with LLM("smollm2-135m", load_format="dummy", dtype="bfloat16", kv_memory="16MiB") as llm:
        (output,) = llm.generate(["heart size is normal."], SamplingParams(max_tokens=2, ignore_eos=True))
        assert any(constants.MODEL in note for note in llm.model.notes)
    assert len(output.prompt_token_ids) > 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"mode": "sequentail"}, "unknown mode 'sequentail'; did you mean sequential? known: "),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'; known: auto, float32, bfloat16, float16"),
        ({"load_format": "gguf"}, "unknown load_format 'gguf'; known: auto, dummy"),
        ({"kernels": "fast"}, "unknown kernels 'fast'; known: auto, plain"),
        ({"device": "tpu"}, "device 'tpu': must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "device 'cuda:99': "),
        ({"max_batch": 0}, "max_batch must be 1 or more, not 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
        ({"prefill_tokens": 0}, "prefill_tokens must be 1 or more, not 0"),
        ({"kv_memory": "lots"}, "kv_memory 'lots' is not a size; write 'auto' or a number with a unit"),
        ({"kv_memory": "10B"}, "kv_memory '10B' is less than one block"),
        ({"model": "opt-125"}, "unknown model 'opt-125'; did you mean opt-125m"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: dict[str, object], line: str) -> None:
    with pytest.raises(InputError) as caught:
        LLM(**arguments)  # type: ignore[arg-type]  # wrong on purpose
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_hub_model_that_is_not_here_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"neither in the local cache nor available from the hub.*load_format dummy"):
        LLM("opt-125m")


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_weights_that_do_not_fit_are_refused_before_they_are_made(
    load_format: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitwiser.model.loading.free_memory", lambda _: 1000)
    monkeypatch.setattr("splitwiser.model.loading.draw_weights", pytest.fail)
    monkeypatch.setattr("splitwiser.model.loading.read_weights", pytest.fail)
    line = (
        r"its weights in float16 take 0\.0 GiB, and 0\.0 GiB are available on cpu; a smaller dtype or model is needed"
    )
    with pytest.raises(InputError, match=line):
        LLM(tiny("llama"), load_format=load_format, dtype="float16")


def test_a_pool_that_does_not_fit_beside_the_weights_is_refused_before_they_are_made(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitwiser.model.loading.free_memory", lambda _: 2 << 30)
    monkeypatch.setattr("splitwiser.model.loading.read_weights", pytest.fail)
    with pytest.raises(
        InputError, match=r"kv_memory '2GiB' is more than the 2\.0 GiB that are available beside the weights"
    ):
        LLM(tiny("llama"), kv_memory="2GiB")


def test_a_mode_that_does_not_work_here_is_refused_with_the_reason(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.memfd_create", forbidden)
    with pytest.raises(InputError, match="mode mp: cannot share memory between processes: memfd_create: Operation not"):
        LLM(tiny("llama"), mode="mp")


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "line"),
    [
        ([], 1, "request 0: the prompt has no tokens"),
        ([VOCABULARY], 1, f"request 0: token id {VOCABULARY} is not in .* vocabulary of {VOCABULARY}"),
        ([-1], 1, "request 0: token id -1 is not in"),
        ([5] * POSITIONS, 2, f"request 0: {POSITIONS} prompt tokens and 2 new ones need {POSITIONS + 1} positions"),
        (
            [5] * 60,
            10,
            "request 0: 60 prompt tokens and 10 new ones need room for 69 tokens in the KV pool, which holds 64",
        ),
        ("text", 1, "request 0: .* has no tokenizer; give its prompt as token ids"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_at_once(
    prompt: str | list[int], max_tokens: int, line: str, tiny: Callable[[str], Path]
) -> None:
    seen = Seen()
    # 4 blocks of 16 tokens, each 3 layers x 2 x 2 heads x 12 x 4 bytes a token
    with LLM(tiny("llama"), kv_memory=f"{4 * 16 * 3 * 2 * 2 * 12 * 4}B") as llm, pytest.raises(InputError, match=line):
        llm.generate([prompt], SamplingParams(max_tokens=max_tokens), observer=seen)
    assert seen.steps == []


def test_token_ids_of_parameters_must_be_the_models_own(tiny: Callable[[str], Path]) -> None:
    given = {
        "stop_token_ids": SamplingParams(stop_token_ids=[VOCABULARY]),
        "logit_bias": SamplingParams(logit_bias={VOCABULARY: 1}),
    }
    with LLM(tiny("llama")) as llm:
        for name, params in given.items():
            with pytest.raises(
                InputError, match=f"request 0: {name}: token id {VOCABULARY} is not in .* vocabulary of"
            ):
                llm.make_requests([[5]], params)


@MODES
def test_a_closed_loop_keeps_so_many_requests_open(mode: str, tiny: Callable[[str], Path]) -> None:
    params = [SamplingParams(max_tokens=2 + 3 * (number % 4), ignore_eos=True) for number in range(11)]
    seen = Seen()
    with LLM(tiny("opt"), mode=mode, batch_size=4) as llm:
        outputs = llm.generate([[5 + number] for number in range(11)], params, max_concurrency=3, observer=seen)
        (start_ns,) = {output.metrics.arrival_ns for output in outputs[:3]}
    finishes = [output.metrics.token_ns[-1] for output in outputs]
    for output in outputs:
        moment = output.metrics.arrival_ns
        assert output.metrics.prefill_start_ns >= moment
        arrived = sum(other.metrics.arrival_ns <= moment for other in outputs)
        assert arrived - sum(finish <= moment for finish in finishes) <= 3
    assert {output.metrics.arrival_ns for output in outputs[3:]} <= set(finishes)
    assert min(output.metrics.arrival_ns for output in outputs[3:]) > start_ns
    assert max(step.requests for step in seen.steps) <= 3


def test_a_closed_loop_has_no_arrival_times(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt")) as llm:
        with pytest.raises(InputError, match="leave arrival_s out"):
            llm.generate([[3]], arrival_s=[0], max_concurrency=1)
        with pytest.raises(InputError, match="max_concurrency must be 1 or more, not 0"):
            llm.generate([[3]], max_concurrency=0)


def test_requests_of_low_priority_are_served_first_and_none_starves(tiny: Callable[[str], Path]) -> None:
    prompts, priority = [[5] * 20 for _ in range(4)], [3, 1, 2, 0]
    orders: list[list[int]] = []
    for ageing_s in (60, 0):
        with LLM(tiny("llama"), policy=f"priority:ageing_s={ageing_s}", max_batch=1) as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True), priority=priority)
        orders.append([output.request_id for output in sorted(outputs, key=lambda each: each.metrics.token_ns[0])])
    assert orders == [[3, 1, 2, 0], [0, 1, 2, 3]]
    assert [output.priority for output in outputs] == priority


def test_requests_that_are_predicted_to_end_soon_are_served_first(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("llama"), policy="shortest_remaining", max_batch=1) as llm:
        predicted: list[Any] = [None, np.int64(8), 2]
        outputs = llm.generate([[5] * 20] * 3, SamplingParams(max_tokens=9), predicted_tokens=predicted)
    assert [output.request_id for output in sorted(outputs, key=lambda each: each.metrics.token_ns[0])] == [2, 1, 0]


def test_what_the_policy_does_not_read_is_refused(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), policy="fcfs") as llm:
        assert llm.config.policy == "first_come"
        with pytest.raises(InputError, match="priority is for policy priority, and this is first_come"):
            llm.generate([[3]], priority=[1])
        with pytest.raises(InputError, match="ttft_target_ms is for policy deadline, and this is first_come"):
            llm.generate([[3]], ttft_target_ms=[100])
        with pytest.raises(
            InputError, match="predicted_tokens is for policy shortest_remaining, and this is first_come"
        ):
            llm.generate([[3]], predicted_tokens=[100])


def test_priorities_and_targets_that_are_none_are_refused(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), policy="deadline") as llm:
        with pytest.raises(InputError, match="ttft_target_ms has 1 entries for 2 prompts"):
            llm.generate([[3], [4]], ttft_target_ms=[5])
        with pytest.raises(InputError, match="request 1: ttft_target_ms must be more than 0 milliseconds, not 0"):
            llm.generate([[3], [4]], ttft_target_ms=[None, 0])
        with pytest.raises(InputError, match=r"request 0: priority must be a whole number, not 1\.5"):
            llm.make_requests([[3]], priority=[1.5])  # type: ignore[list-item]  # wrong on purpose
        with pytest.raises(InputError, match="request 1: predicted_tokens must be a whole number of 1 or more, not 0"):
            llm.make_requests([[3], [4]], predicted_tokens=[None, 0])


def test_lists_that_do_not_match_the_prompts_are_refused(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt")) as llm:
        with pytest.raises(InputError, match="sampling_params has 1 entries for 2 prompts"):
            llm.generate([[3], [4]], [SamplingParams()])
        with pytest.raises(InputError, match="arrival_s has 3 entries for 2 prompts"):
            llm.generate([[3], [4]], arrival_s=[0, 0, 0])
        with pytest.raises(InputError, match="request 1: arrival_s must be 0 or more seconds, not -1"):
            llm.generate([[3], [4]], arrival_s=[0, -1])
        with pytest.raises(InputError, match=r"request 1: arrives 1.7e\+09 s after the start, which is 53.8 years"):
            llm.generate([[3], [4]], arrival_s=[0, 1.7e9])
        with pytest.raises(InputError, match="stop strings need a tokenizer"):
            llm.generate([[3]], SamplingParams(stop=("a",)))


def test_generation_settings_of_a_checkpoint_are_applied_if_asked_for_and_named(
    tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    import json
    import shutil

    directory = tmp_path / "penalised"
    shutil.copytree(tiny("llama"), directory)
    settings = json.loads((directory / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 5.0, "top_h": 0.4, "top_k": 7, "num_beams": 1}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    (plain,), (penalised,) = (references(each, [[5, 6, 7]], 30) for each in (tiny("llama"), directory))
    assert plain != penalised
    for mode, choice, tokens, note in (
        ("generate", "none", plain, "is not applied: repetition_penalty=5.0; generation_config checkpoint does"),
        ("sequential", "none", plain, "is not applied: repetition_penalty=5.0; generation_config checkpoint does"),
        ("generate", "checkpoint", penalised, "are the checkpoint's own: repetition_penalty=5.0"),
        ("sequential", "checkpoint", penalised, "are the checkpoint's own: repetition_penalty=5.0"),
        ("mp", "checkpoint", penalised, "are the checkpoint's own: repetition_penalty=5.0"),
    ):
        params = [SamplingParams(max_tokens=30), SamplingParams(max_tokens=30, repetition_penalty=1e-3)]
        with LLM(directory, mode=mode, generation_config=choice) as llm:
            left, own = (output.token_ids for output in llm.generate([[5, 6, 7]] * 2, params))
            notes = llm.model.notes
        assert left == tokens
        assert own not in (plain, penalised)
        assert notes[0] == "the checkpoint's generation settings are not applied, in any mode: top_h=0.4"
        assert notes[1].endswith(note)
    with pytest.raises(InputError, match="unknown generation_config 'auto'; known: none, checkpoint"):
        LLM(directory, generation_config="auto")


@MODES
def test_a_checkpoints_own_end_of_sequence_can_be_ignored(
    mode: str, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    import json
    import shutil

    with LLM(tiny("opt"), mode=mode) as llm:
        (free,) = llm.generate([[7, 8, 9]], SamplingParams(max_tokens=30, ignore_eos=True))
    directory = tmp_path / "ends"
    shutil.copytree(tiny("opt"), directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": free.token_ids[4]}))
    with LLM(directory, mode=mode) as llm:
        (ended,) = llm.generate([[7, 8, 9]], SamplingParams(max_tokens=30))
        (ignoring,) = llm.generate([[7, 8, 9]], SamplingParams(max_tokens=30, ignore_eos=True))
    assert len(ended.token_ids) <= 5
    assert ignoring.token_ids == free.token_ids


def test_a_run_that_was_interrupted_cannot_mix_with_the_next(tiny: Callable[[str], Path]) -> None:
    class Interrupts(Observer):
        def on_step(self, record: StepRecord) -> None:
            raise KeyboardInterrupt

    with LLM(tiny("opt")) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5]], SamplingParams(max_tokens=9), observer=Interrupts())
        with pytest.raises(RunError, match=r"an earlier run was interrupted.*make a new LLM"):
            llm.generate([[5]], SamplingParams(max_tokens=9))


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("seen \ud83d", "request 1: the prompt: character 6 is half of a surrogate pair (U+D83D)"),
        ([5, "6"], "request 1: the prompt must be text or token ids, not [5, '6']"),
        (7, "request 1: the prompt must be text or token ids, not 7"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused(prompt: Any, line: str) -> None:
    with LLM() as llm:
        assert_says(refusal(llm.generate, ["fine", prompt]), line)


def test_prompts_in_vllms_form_and_in_arrays_give_plain_ids(tiny: Callable[[str], Path]) -> None:
    prompts: list[Any] = [
        [5, 6, 7], (5, 6, 7), np.array([5, 6, 7]), torch.tensor([5, 6, 7]), [np.int64(5), torch.tensor(6), 7],
        {"prompt_token_ids": torch.tensor([5, 6, 7])}, {"prompt": "its text", "prompt_token_ids": [5, 6, 7]},
    ]  # fmt: skip
    with LLM(tiny("opt")) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=3))
        batch = llm.generate(torch.tensor([[5, 6, 7], [8, 9, 10]]))  # type: ignore[arg-type]  # its rows are prompts
    for output in outputs:
        assert output.prompt_token_ids == (5, 6, 7)
        assert {type(each) for each in (*output.prompt_token_ids, *output.outputs[0].token_ids)} == {int}
        assert output.token_ids == outputs[0].token_ids
    assert [output.prompt for output in outputs] == [None] * 6 + ["its text"]
    assert [output.prompt_token_ids for output in batch] == [(5, 6, 7), (8, 9, 10)]


def test_one_prompt_needs_no_list() -> None:
    with LLM() as llm:
        outputs = [llm.generate(prompt, SamplingParams(max_tokens=3)) for prompt in ("heart", {"prompt": "heart"})]
    assert [[output.prompt for output in each] for each in outputs] == [["heart"], ["heart"]]


@pytest.mark.parametrize(
    ("prompts", "line"),
    [
        ([1, 2], "request 0: the prompt must be text or token ids, not 1; give a list of prompts, such as [[5, 6, 7]]"),
        ([np.ones(2)], "request 0: the prompt must be text or token ids, not array([1., 1.])"),
        ([[1.0] * 9999], "request 0: the prompt must be text or token ids, not [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, ...]"),
        ([{"promt": "a"}], "unknown key of request 0's prompt 'promt'; did you mean prompt? known: "),
        ([[5], {}], "request 1: the prompt must have 'prompt', 'prompt_token_ids' or 'messages'"),
    ],
)
def test_a_wrong_form_of_prompt_is_named_in_a_short_line(
    prompts: list[Any], line: str, tiny: Callable[[str], Path]
) -> None:
    with LLM(tiny("opt")) as llm:
        assert refusal(llm.generate, prompts).startswith(line)


@pytest.mark.parametrize(("mode", "kv_memory", "new"), [("generate", "auto", 254), ("sequential", "64", 62)])
def test_without_max_tokens_a_request_takes_what_there_is_room_for(
    mode: str, kv_memory: str, new: int, tiny: Callable[[str], Path]
) -> None:
    size = kv_memory if kv_memory == "auto" else room_for(tiny("opt"), int(kv_memory))
    with LLM(tiny("opt"), mode=mode, kv_memory=size) as llm:
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=None, ignore_eos=True))
        longest = refusal(llm.generate, [[5] * 257], SamplingParams(max_tokens=None))
    assert (len(output.token_ids), output.finish_reason) == (new, "length")
    assert "257 prompt tokens and 1 new ones need" in longest


@pytest.mark.parametrize(("name", "room", "new"), [("bart", "auto", 256), ("t5", "64", 61)])
def test_the_answer_of_an_encoder_decoder_has_positions_of_its_own(
    name: str, room: str, new: int, tiny: Callable[[str], Path]
) -> None:
    size = room if room == "auto" else room_for(tiny(name), int(room))
    with LLM(tiny(name), kv_memory=size) as llm:
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=None, ignore_eos=True))
        longest = refusal(llm.generate, [[5] * 257], SamplingParams(max_tokens=None))
    assert (len(output.token_ids), len(output.prompt_token_ids)) == (new, 3)
    assert longest.startswith("request 0: 257 prompt tokens and ")


def test_without_max_tokens_and_without_a_limit_a_number_is_asked_for(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("mamba"), mode="generate") as llm:
        line = refusal(llm.generate, [[5]], SamplingParams(max_tokens=None))
    assert line == "request 0: max_tokens None needs a limit, and tiny-mamba has none; give a number"


def test_a_bar_is_shown_on_request(tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(tiny("opt")) as llm:
        capsys.readouterr()
        llm.generate([[5], [6]])
        assert capsys.readouterr().err == ""
        llm.generate([[5], [6]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=True)
        assert "2/2 requests, 8 tokens" in capsys.readouterr().err


def test_shows_itself_in_one_line(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), dtype=torch.bfloat16) as llm:
        assert repr(llm) == "LLM('tiny-opt', mode='sequential', workers='1 mixed', dtype='bfloat16', device='cpu')"
    assert repr(llm).endswith("device='cpu', closed)")


def test_an_unknown_option_gets_the_nearest_or_the_reason() -> None:
    assert refusal(LLM, "opt-125m", dtyp="bf16") == "unknown option of EngineConfig 'dtyp'; did you mean dtype?"
    assert refusal(LLM, max_num_seqs=8) == "'max_num_seqs' is no option of EngineConfig: here it is max_batch"
    assert refusal(RunConfig, limt=8) == "unknown option of RunConfig 'limt'; did you mean limit?"


def test_only_the_face_is_listed() -> None:
    assert set(dir(splitwiser)) == {
        "LLM",
        "EngineConfig",
        "RequestOutput",
        "RunConfig",
        "SamplingParams",
        "__version__",
    }


@MODES
def test_threads_take_turns(mode: str, tiny: Callable[[str], Path]) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [[5, 6, 7], [8, 9]]
    with LLM(tiny("opt"), mode=mode) as llm, ThreadPoolExecutor() as threads:
        apart = list(threads.map(lambda prompt: llm.generate([prompt], params)[0].token_ids, prompts))
        together = [output.token_ids for output in llm.generate(prompts, params)]
    assert apart == together


def in_a_pool(directory: Path) -> str:
    return refusal(LLM, directory, mode="mp")


@pytest.mark.slow
def test_a_daemonic_process_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        line = pool.apply(in_a_pool, [tmp_path])  # where there is no model
    assert line.startswith("mode mp: needs worker processes, which a daemonic process")


@pytest.mark.parametrize("mode", ["generate", "sequential", "mp"])
def test_a_closed_one_has_given_its_weights_back_and_says_so(mode: str, tiny: Callable[[str], Path]) -> None:
    llm = LLM(tiny("opt"), mode=mode, kv_memory="auto" if mode == "generate" else "1MiB")
    assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
    for _ in range(2):  # closing it again changes nothing
        llm.close()
        assert llm.started.pool is None
        assert all(parameter.is_meta for parameter in llm.model.module.parameters())
        assert refusal(llm.generate, [[5, 6, 7]]) == "this LLM is closed; make a new one"


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("mode", ["generate", "sequential", "mp", "green"])
def test_a_closed_one_has_given_the_gpu_back(mode: str, tiny: Callable[[str], Path]) -> None:
    def used() -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    # the libraries' workspaces stay with the process; a pool of 1 GiB shows beside them
    size = "auto" if mode == "generate" else "1GiB"
    before = []
    for _ in range(3):
        before.append(used())
        with LLM(tiny("llama"), mode=mode, device="cuda", kv_memory=size) as llm:
            llm.generate([[5, 6, 7]])
    assert before[2] - before[1] < 1 << 29


def test_workers_get_no_more_than_an_engines_configuration(tiny: Callable[[str], Path]) -> None:
    # a worker that got a run's would import what workloads are read with
    with LLM(config=RunConfig(model=tiny("opt"), max_batch=3, limit=5), prefill_tokens=9) as llm:
        assert type(llm.config) is EngineConfig
        assert (llm.config.max_batch, llm.config.prefill_tokens) == (3, 9)


def test_the_docstring_names_every_option() -> None:
    described = re.findall(r"- ``(\w+)``: ", str(LLM.__doc__))
    assert sorted([*described, "model"]) == sorted(option_fields(EngineConfig))


FINDING = (
    "the lungs are clear. there is no pleural effusion. marked pulmonary edema is seen, less than on the prior study."
)


@MODES
def test_a_chat_is_the_prompt_that_the_template_writes(mode: str, chatty: Path) -> None:
    message = {"role": "user", "content": FINDING}
    prompt = f"### findings: {FINDING} ### impressions:"
    params = SamplingParams(max_tokens=40)
    with LLM(chatty, mode=mode) as llm:
        (plain,) = llm.generate(prompt, params)
        (one,) = llm.chat([message], params)
        both = llm.chat([[message], [message] * 2], [params, SamplingParams(max_tokens=1)])
        (form,) = llm.generate([{"messages": [message]}], params)
    # the template has written the token that begins a sequence, and the tokenizer writes no second one
    assert one.prompt_token_ids == plain.prompt_token_ids
    assert one.prompt == form.prompt == f"</s>{prompt}"
    assert "edema" in one.text
    assert one.token_ids == plain.token_ids == both[0].token_ids == form.token_ids
    assert [len(output.token_ids) for output in both[1:]] == [1]


def test_the_template_writes_a_chat_once(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[object] = []
    with LLM(chatty) as llm:
        write = llm.model.write_chat

        def noted(messages: Any, where: str) -> str:
            written.append(messages)
            return write(messages, where)

        monkeypatch.setattr(llm.model, "write_chat", noted)
        llm.chat([{"role": "user", "content": FINDING}], SamplingParams(max_tokens=1))
    assert len(written) == 1


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ("hello", "request 0: messages must be a list, each with 'role' and 'content', not 'h'"),
        ([[]], "request 0: a chat needs at least one message"),
        ([{"role": "user", "text": "a"}], "request 0: message 0 must have 'role' and 'content' alone, not {'role': "),
        ([{"role": "user", "content": 5}], "request 0: message 0: its content must be text, not 5"),
        ([{"role": "system", "content": "a"}], "request 0: chatty's chat template refuses it: no system here"),
    ],
)
def test_a_wrong_chat_is_named(messages: Any, line: str, chatty: Path) -> None:
    with LLM(chatty) as llm:
        assert_says(refusal(llm.chat, messages), line)


def test_a_model_without_a_template_or_a_tokenizer_says_so(tiny: Callable[[str], Path]) -> None:
    message = [{"role": "user", "content": "a"}]
    with LLM() as llm:
        assert_says(refusal(llm.chat, message), "request 0: radiology-opt has no chat template; give a prompt")
    with LLM(tiny("opt")) as llm:
        assert_says(refusal(llm.chat, message), "request 0: tiny-opt has no tokenizer")
