"""What a run asks for, by source: prompts, lengths and arrival times."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from splitwiser.config import RunConfig
from splitwiser.model.loading import load_model
from splitwiser.request import SamplingParams
from splitwiser.workload.job import READERS, Job, prepare_job
from splitwiser.workload.planned import PlannedRequest
from tests.support.assertions import assert_says, refusal
from tests.support.models import POSITIONS, VOCABULARY

TRACE = [("2023-11-16 18:15:00.5", 40, 4), ("2023-11-16 18:15:01.0", 60, 9), ("2023-11-16 18:15:03.0", 90, 2)]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "conv.csv"
    rows = "\n".join(",".join(map(str, row)) for row in TRACE)
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}\n")
    return str(path)


@pytest.fixture
def workload(tmp_path: Path) -> str:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"max_new_tokens": [3, 5, 7], "prompts": ["a", [4], "b"], "arrival_s": [0.0, 1.0, 2.0]}))
    return str(path)


def job_of(**settings: Any) -> Job:
    config = RunConfig(**settings)
    return prepare_job(config, config.seed)


def each(job: Job, name: str) -> list[Any]:
    return [getattr(request, name) for request in job.requests]


def limits(job: Job, config: RunConfig) -> list[tuple[int | None, bool]]:
    return [(params.max_tokens, params.ignore_eos) for params in job.sampling_params(config)]


def test_a_case_makes_prompts_of_its_reports() -> None:
    job = job_of(limit=3)
    assert (job.label, job.exact) == ("case0", False)
    assert (each(job, "new_tokens"), job.arrival_s) == ([200] * 3, [0.0] * 3)
    assert all(each(job, "prompt"))
    assert all(report.impression for report in each(job, "report"))


def test_an_encoder_decoder_gets_the_prompts_of_its_own(tiny: Callable[[str], Path]) -> None:
    job = job_of(limit=2)
    for name, start in (("llama", "### findings: "), ("t5", "summarize: ")):
        model = load_model(tiny(name), dtype="float32", device="cpu", load_format="auto", weights=False)
        assert all(str(prompt).startswith(start) for prompt in job.make_prompts(model, seed=0))


def test_a_case_may_be_of_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("7: {description: mine, prompt: 'in short:', max_new_tokens: 3}")
    job = job_of(cases=str(tmp_path / "mine.yaml"), case_id=7, limit=2)
    assert (job.label, each(job, "new_tokens")) == ("case7", [3, 3])
    assert all(prompt.endswith("in short:") for prompt in each(job, "prompt"))
    assert refusal(job_of, cases=str(tmp_path / "mine.yaml")) == "unknown case '0'; known: 7"
    assert refusal(job_of, cases=str(tmp_path / "none.yaml")) == f"{tmp_path}/none.yaml: no such file"


def test_a_workload_gives_each_prompt_its_own_limit(workload: str) -> None:
    job = job_of(workload=workload, limit=2)
    assert (job.label, each(job, "prompt"), job.arrival_s) == ("mine", ["a", (4,)], [0.0, 1.0])
    assert limits(job, RunConfig()) == [(3, False), (5, False)]
    assert limits(job, RunConfig(max_new_tokens=4)) == [(4, False), (4, False)]


def test_a_format_of_files_is_a_row_and_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_lengths(path: Path) -> list[PlannedRequest]:
        rows = [line.split(",") for line in path.read_text().splitlines()]
        return [PlannedRequest(None, int(prompt), int(new), float(arrival_s)) for prompt, new, arrival_s in rows]

    monkeypatch.setitem(READERS, ".lengths", read_lengths)
    path = tmp_path / "mine.lengths"
    path.write_text("40,4,0\n60,9,1\n")
    job = job_of(workload=str(path))
    assert (job.label, job.exact, each(job, "prompt_tokens"), job.arrival_s) == ("mine", True, [40, 60], [0, 1])
    assert limits(job, RunConfig()) == [(4, True), (9, True)]


def test_a_trace_gives_lengths_and_times(trace: str) -> None:
    job = job_of(trace=trace)
    assert (job.label, each(job, "prompt"), each(job, "prompt_tokens")) == ("conv", [None] * 3, [40, 60, 90])
    assert job.arrival_s == [0.0, 0.5, 2.5]
    assert limits(job, RunConfig()) == [(4, True), (9, True), (2, True)]


def test_a_trace_can_be_taken_in_part_and_speeded_up(trace: str) -> None:
    job = job_of(trace=trace, trace_slice="0.25:", trace_speed=0.5, limit=1)
    assert (each(job, "prompt_tokens"), job.arrival_s) == ([60], [0.5])


def test_a_traces_lengths_can_be_cut_and_the_run_says_so(trace: str) -> None:
    config = RunConfig(trace=trace, max_prompt_tokens=60, max_new_tokens=4)
    job = prepare_job(config, config.seed)
    assert each(job, "prompt_tokens") == [40, 60, 60]
    assert limits(job, config) == [(4, True), (4, True), (2, True)]
    assert job.notes == ("1 of 3 requests are cut to 60 prompt tokens", "1 of 3 requests are cut to 4 new tokens")


def test_what_is_short_enough_is_not_cut(trace: str) -> None:
    assert job_of(trace=trace, max_prompt_tokens=90, max_new_tokens=9) == job_of(trace=trace)


def test_a_traces_times_can_be_kept_with_other_lengths(trace: str) -> None:
    job = job_of(trace=trace, prompt_tokens="7", output_tokens="8")
    assert job.arrival_s == [0.0, 0.5, 2.5]
    assert (each(job, "prompt_tokens"), each(job, "new_tokens")) == ([7] * 3, [8] * 3)


@pytest.mark.parametrize(("settings", "new"), [({}, 128), ({"max_new_tokens": 6}, 6), ({"output_tokens": "9"}, 9)])
def test_synthetic_requests_make_just_so_many_tokens(settings: dict[str, Any], new: int) -> None:
    config = RunConfig(prompt_tokens="50", requests=4, **settings)
    job = prepare_job(config, config.seed)
    assert (job.label, each(job, "prompt"), each(job, "prompt_tokens")) == ("synthetic", [None] * 4, [50] * 4)
    assert limits(job, config) == [(new, True)] * 4
    assert job.notes == ()


def test_synthetic_requests_have_a_default_number() -> None:
    assert len(job_of(prompt_tokens="5").requests) == 100


@pytest.mark.parametrize("source", ["case", "jsonl", "csv", "workload", "trace", "synthetic"])
def test_a_limit_is_kept_by_every_source(source: str, workload: str, trace: str, tmp_path: Path) -> None:
    texts = pd.DataFrame({"findings": ["a", "b", "c"], "impression": ["d", "e", "f"]})
    texts.to_csv(tmp_path / "texts.csv", index=False)
    texts.to_json(tmp_path / "texts.jsonl", orient="records", lines=True)
    settings: dict[str, dict[str, Any]] = {
        "case": {},
        "jsonl": {"data": str(tmp_path / "texts.jsonl")},
        "csv": {"data": str(tmp_path / "texts.csv")},
        "workload": {"workload": workload},
        "trace": {"trace": trace},
        "synthetic": {"prompt_tokens": "uniform:3:9", "requests": 3},
    }
    for limit, count in ((2, 2), (3, 3), (4, None)):
        job = job_of(**settings[source], limit=limit, output_tokens="5")
        wanted = (4 if source == "case" else 3) if count is None else count
        assert len(job.requests) == wanted
        assert len({request.prompt or request.prompt_tokens for request in job.requests}) > 1


def test_output_lengths_of_a_case_can_be_set() -> None:
    config = RunConfig(limit=50, output_tokens="uniform:2:4")
    found = limits(prepare_job(config, config.seed), config)
    assert {tokens for tokens, _ in found} == {2, 3, 4}
    assert all(ignoring for _, ignoring in found)


def test_a_rate_replaces_the_workloads_own_times(workload: str) -> None:
    times = job_of(workload=workload, request_rate=2.0).arrival_s
    assert list(times) != [0.0, 1.0, 2.0]
    assert times[-1] == pytest.approx(3 / 2)
    assert list(job_of(workload=workload, request_rate=float("inf")).arrival_s) == [0.0] * 3


def test_the_seed_fixes_arrivals_and_lengths() -> None:
    drawn = [
        job_of(prompt_tokens="uniform:1:90", output_tokens="uniform:1:90", request_rate=3.0, requests=9, seed=seed)
        for seed in (5, 5, -6)
    ]
    assert drawn[0] == drawn[1]
    for name in ("prompt_tokens", "new_tokens", "arrival_s"):
        assert each(drawn[0], name) != each(drawn[2], name)


def test_what_is_drawn_for_one_thing_moves_nothing_else() -> None:
    one = job_of(prompt_tokens="uniform:1:90", request_rate=3.0, requests=9)
    other = job_of(
        prompt_tokens="uniform:1:90", output_tokens="normal:5:2", request_rate=3.0, burstiness=0.5, requests=9
    )
    assert each(one, "prompt_tokens") == each(other, "prompt_tokens")
    assert one.arrival_s != other.arrival_s


def test_prompt_and_output_lengths_are_drawn_apart() -> None:
    job = job_of(prompt_tokens="uniform:1:1000", output_tokens="uniform:1:1000", requests=400)
    assert abs(np.corrcoef(each(job, "prompt_tokens"), each(job, "new_tokens"))[0, 1]) < 0.15


def test_random_prompts_suit_the_model(tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("llama"), dtype="float32", device="cpu", load_format="auto")
    job = job_of(prompt_tokens="100", output_tokens="5", requests=30)
    prompts = job.make_prompts(model, seed=1)
    assert [len([*prompt]) for prompt in prompts] == [100] * 30
    tokens = {token for prompt in prompts for token in prompt}
    assert tokens == set(range(VOCABULARY)) - {0, 1, 2}  # its padding, begin and end-of-sequence
    assert job.make_prompts(model, seed=1) == prompts != job.make_prompts(model, seed=2)


def test_a_prompt_beyond_the_models_positions_is_refused_before_it_is_drawn(tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("llama"), dtype="float32", device="cpu", load_format="auto")
    job_of(prompt_tokens=str(POSITIONS - 4), output_tokens="5", requests=1).make_prompts(model, 0)
    for tokens in (POSITIONS - 3, 10**9):
        job = job_of(prompt_tokens=str(tokens), output_tokens="5", requests=1)
        message = refusal(job.make_prompts, model, 0)
        assert_says(
            message, f"request 0: {tokens} prompt tokens and 5 new ones", f"has {POSITIONS}", "--max_prompt_tokens"
        )


def test_requests_own_parameters_go_before_the_options_and_the_run_says_so(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt": "a", "max_tokens": 3, "temperature": 0, "stop": ["x"]}\n{"prompt": "b", "max_tokens": 4}\n'
    )
    config = RunConfig(workload=str(path), temperature=0.7, stop="###", max_new_tokens=9)
    job = prepare_job(config, config.seed)
    assert job.sampling_params(config) == [
        SamplingParams(max_tokens=9, temperature=0, stop=["x"]),
        SamplingParams(max_tokens=9, temperature=0.7, stop=["###"]),
    ]
    assert job.notes == (
        "temperature is as the workload says for 1 of 2 requests",
        "stop is as the workload says for 1 of 2 requests",
    )
    assert refusal(prepare_job, RunConfig(workload=str(path), output_tokens="5"), 0).startswith(
        "request 0: stop changes"
    )


@pytest.mark.parametrize(
    ("given", "stop"),
    [("###", ("###",)), ('["\\n", "a b"]', ("\n", "a b")), ("[/INST]", ("[/INST]",)), ("[1]", ("[1]",)), (None, ())],
)
def test_stop_is_a_text_or_a_list_of_texts(given: str | None, stop: tuple[str, ...]) -> None:
    assert RunConfig(stop=given).sampling_params(5).stop == stop


def test_reports_can_be_given_as_chats() -> None:
    plain, chats = job_of(limit=2), job_of(limit=2, chat_template=True)
    assert each(chats, "prompt") == [
        {"messages": [{"role": "user", "content": text}]} for text in each(plain, "prompt")
    ]
    assert each(chats, "report") == each(plain, "report")
    assert each(chats, "source") == [None, None]  # so that an encoder-decoder is asked by its template too, or refused


def test_chats_of_a_workload_stay_as_they_are_and_token_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    path.write_text(json.dumps({"max_new_tokens": 3, "prompts": [chat]}))
    assert each(job_of(workload=str(path), chat_template=True), "prompt") == [chat]
    path.write_text(json.dumps({"max_new_tokens": 3, "prompts": ["a", [4]]}))
    assert_says(refusal(job_of, workload=str(path), chat_template=True), "request 1: its prompt is token ids")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"prompt_tokens": "5", "chat_template": True}, "--chat_template is for prompts of text"),
        ({"prompt_tokens": "5", "stop": "a"}, "--stop changes when a request ends"),
        ({"output_tokens": "5", "stop": "a"}, "--stop changes when a request ends"),
        ({"trace": "a.csv", "stop_token_ids": "0"}, "--stop_token_ids changes when a request ends"),
        ({"output_tokens": "5", "min_tokens": 3}, "--min_tokens changes when a request ends"),
        ({"stop": ""}, "stop must be a string"),
    ],
)
def test_what_needs_text_is_refused_without(settings: dict[str, Any], part: str) -> None:
    assert_says(refusal(RunConfig, **settings), part)
