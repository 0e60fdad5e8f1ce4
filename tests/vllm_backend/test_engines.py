"""Engines of vLLM in its own environment: their tokens, their records and their ends. Skipped where it is not installed."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from splitwiser import LLM, SamplingParams
from splitwiser.config import RunConfig
from splitwiser.errors import InputError, RunError
from splitwiser.run import run
from tests.support.assertions import assert_says, refusal
from tests.support.commands import finished, only_run
from tests.support.models import make_tiny
from tests.support.observers import Canceller, Seen, Trigger
from tests.support.processes import abandoned_segments, session_of, wait_for
from tests.support.running import Running
from tests.support.tokens import prompts_of, references

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WIDE: dict[str, dict[str, Any]] = {  # vLLM has kernels for heads of 32 numbers or more
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128},
    "llama": {"hidden_size": 128, "max_position_embeddings": 640},
    "qwen3": {"hidden_size": 128, "head_dim": 32},
}
WHOLE = [{"role": "mixed", "count": 2}]
SPLIT = [{"role": "prefill"}, {"role": "decode"}]
TWO_OF_EACH = [{"role": "prefill", "count": 2}, {"role": "decode", "count": 2}]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint directory of a tiny model with heads that vLLM has kernels for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp("wide") / f"wide-{name}", **WIDE[name])
        return made[name]

    return get


@pytest.fixture
def options(vllm_python: str) -> dict[str, Any]:
    return {"backend": "vllm", "backend_python": vllm_python, "kernels": "plain"}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("opt", None),
        ("opt", SPLIT),
        ("llama", WHOLE),
        ("llama", TWO_OF_EACH),
        ("qwen3", SPLIT),
    ],
)
def test_tokens_are_those_of_generate_with_blocks_used_again_and_requests_preempted(
    name: str, layout: Any, wide: Callable[[str], Path], options: dict[str, Any]
) -> None:
    rng = random.Random(3)
    prompts = prompts_of([rng.randint(1, 150) for _ in range(64)], seed=5)
    params = [SamplingParams(max_tokens=rng.choice([1, 2, 20, 60])) for _ in prompts]
    if layout is not None:
        options |= {"mode": "mp", "workers": layout}
    seen = Seen()
    # about ten blocks of 128 tokens an engine, of which a request needs up to two: decode runs out of them
    memory = f"{2 * max(1, len(layout or ()))}MiB" if layout is not TWO_OF_EACH else "8MiB"
    with LLM(wide(name), kv_memory=memory, **options) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, params, observer=seen)
    for output, prompt, each in zip(outputs, prompts, params, strict=True):
        assert each.max_tokens is not None
        expected = references(wide(name), [prompt], each.max_tokens)[0]
        assert output.token_ids == expected[: len(output.token_ids)]
        assert len(output.token_ids) == len(expected)
    assert sorted(output.request_id for output in seen.outputs) == sorted([*range(64)] * 2)
    assert {"prefill", "decode"} <= {step.phase for step in seen.steps}
    if layout is SPLIT:  # decode computes a prompt only for a request that it has preempted
        assert any(step.phase != "decode" for step in seen.steps if step.role == "decode")
        assert all(step.phase == "prefill" for step in seen.steps if step.role == "prefill")
    assert all(step.start_ns < step.end_ns and step.tokens >= step.requests > 0 for step in seen.steps)


@pytest.mark.parametrize(
    ("layout", "transfer", "caching"),
    [
        (None, "shared", True),
        (WHOLE, "shared", True),
        (SPLIT, "shared", True),
        (TWO_OF_EACH, "shared", True),
        (TWO_OF_EACH, "copy", True),
        (SPLIT, "copy", False),
    ],
)
def test_prompts_that_begin_alike(
    layout: Any, transfer: str, caching: bool, wide: Callable[[str], Path], options: dict[str, Any]
) -> None:
    rng = random.Random(6)
    common = prompts_of([400, 300], seed=6)
    ends = prompts_of([rng.randint(1, 60) for _ in range(40)], seed=7)
    prompts = [[*rng.choice(common)[: rng.randint(1, 400)], *end] for end in ends]
    prompts += [common[0][:256], common[0][:256]]  # full blocks, of which the last token is computed anyway
    if layout is not None:
        options |= {"mode": "mp", "workers": layout, "kv_transfer": transfer}
    # 21 blocks of 128 tokens an engine, of which a request needs up to five: they are used again, and decode runs out
    memory = f"{4 * (1 if layout is None else 4 if layout is TWO_OF_EACH else 2)}MiB"
    with LLM(wide("llama"), kv_memory=memory, prefix_caching=caching, prefill_tokens=100, **options) as llm:
        first, second = (llm.generate(prompts, SamplingParams(max_tokens=100)) for _ in range(2))
    for outputs in (first, second):
        assert [output.token_ids for output in outputs] == references(wide("llama"), prompts, 100)
        cached = [output.metrics.cached_tokens for output in outputs]
        assert ({0, 128, 256} if caching else {0}) <= set(cached) <= ({0, 128, 256, 384} if caching else {0})
        assert all(count < len(prompt) for count, prompt in zip(cached, prompts, strict=True))


@pytest.mark.parametrize("layout", [None, SPLIT])
def test_log_probabilities_and_stop_strings_are_those_of_this_projects_engine(
    layout: Any, options: dict[str, Any]
) -> None:
    prompts = ["The heart is of normal size.", "No pleural effusion. The lungs are clear, and there is no mass."]
    asked = SamplingParams(max_tokens=30, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    with LLM() as llm:
        expected = llm.generate(prompts, asked)
        stops = [SamplingParams(max_tokens=30, stop=output.text[20:24], ignore_eos=True) for output in expected]
        stopped = llm.generate(prompts, stops)
    if layout is not None:
        options |= {"mode": "mp", "workers": layout}
    with LLM(kv_memory="8MiB", **options) as llm:
        outputs = llm.generate(prompts, asked)
        if layout is None:
            found = llm.generate(prompts, stops)
        else:
            with pytest.raises(InputError, match="request 0: stop strings may begin in the first token"):
                llm.generate(prompts, stops)
    for output, own in zip(outputs, expected, strict=True):
        assert output.token_ids == own.token_ids
        for theirs, ours in ((output.logprobs, own.logprobs), (output.prompt_logprobs, own.prompt_logprobs)):
            assert theirs is not None
            assert ours is not None
            assert len(theirs) == len(ours)
            for place, own_place in zip(theirs, ours, strict=True):
                assert (place is None) is (own_place is None)
                for token, choice in (place or {}).items():
                    assert choice.logprob == pytest.approx((own_place or {})[token].logprob, abs=1e-4)
    if layout is None:
        assert {output.finish_reason for output in found} == {"stop"}
        assert [output.token_ids for output in found] == [output.token_ids for output in stopped]
        assert [output.text for output in found] == [output.text for output in stopped]


def test_a_run_is_recorded_as_any_other(wide: Callable[[str], Path], tmp_path: Path, options: dict[str, Any]) -> None:
    config = RunConfig(
        model=str(wide("llama")), mode="mp", prompt_tokens="20", output_tokens="8", requests=6, ignore_eos=True,
        results=str(tmp_path), load_format="dummy", **options,
    )  # fmt: skip
    result = run(config)
    record = yaml.safe_load((result.directory / "run.yaml").read_text())
    assert record["status"] == "finished"
    assert record["backend"]["name"] == "vllm"
    assert set(record["backend"]["engines"]) == {"prefill-0", "decode-0"}
    assert record["backend"]["versions"]["vllm"] == record["backend"]["engines"]["decode-0"]["vllm"]
    assert (result.figures["backend"], result.figures["completed"]) == ("vllm", 6)
    for name in ("latency.csv", "throughput.csv", "steps.csv"):
        assert (result.directory / name).exists()


def test_what_an_engine_cannot_serve_is_refused_and_the_rest_sampled_by_its_seed(
    wide: Callable[[str], Path], options: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=4, ignore_eos=True)
    with LLM(wide("opt"), mode="mp", kv_memory="4MiB", **options) as llm:
        first, second = (llm.generate([[5, 6, 7]], params)[0].token_ids for _ in range(2))
        with pytest.raises(InputError, match="request 0: presence_penalty and frequency_penalty count the tokens"):
            llm.generate([[5]], SamplingParams(presence_penalty=1))
        with pytest.raises(InputError, match="need room for"):
            llm.generate([[5] * 250], SamplingParams(max_tokens=7))
    assert first == second


def test_a_model_with_a_recurrent_state_is_refused_by_name(tmp_path: Path, options: dict[str, Any]) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=128, hidden_size=128, num_hidden_layers=2, state_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tiny-mamba")
    line = refusal(LLM, tmp_path / "tiny-mamba", mode="mp", kv_memory="4MiB", **options)
    assert_says(line, "tiny-mamba", "MambaSpec", "one group of plain attention; use mixed workers")


@pytest.mark.parametrize("layout", [SPLIT, WHOLE])
def test_requests_are_cancelled_wherever_they_are_and_no_block_is_lost(
    layout: Any, wide: Callable[[str], Path], options: dict[str, Any]
) -> None:
    rng = random.Random(3)
    prompts = prompts_of([rng.randint(1, 150) for _ in range(40)], seed=5)
    reasons: set[str] = set()
    with LLM(wide("opt"), mode="mp", workers=layout, kv_memory="4MiB", prefix_caching=True, **options) as llm:
        for seed in range(4):  # ten blocks an engine would not do for what is cancelled here if any stayed taken
            seen = Canceller(llm, len(prompts), seed)
            outputs = llm.generate(prompts, SamplingParams(max_tokens=40), observer=seen)
            assert sorted(output.request_id for output in seen.outputs) == list(range(40))
            for output, expected in zip(outputs, references(wide("opt"), prompts, 40), strict=True):
                cancelled = output.finish_reason == "cancelled"
                assert output.token_ids == (expected[: len(output.token_ids)] if cancelled else expected)
                reasons.add(output.finish_reason)
        after = llm.generate(prompts, SamplingParams(max_tokens=40))
    assert [output.token_ids for output in after] == references(wide("opt"), prompts, 40)
    assert {"cancelled", "length"} <= reasons


@pytest.mark.parametrize("killed", ["prefill-0", "decode-0"])
def test_a_killed_engine_is_named_and_nothing_is_left(
    killed: str, wide: Callable[[str], Path], options: dict[str, Any]
) -> None:
    with LLM(wide("opt"), mode="mp", kv_memory="4MiB", **options) as llm:
        trigger = Trigger("decode", lambda: os.kill(llm.pids[killed], signal.SIGKILL))
        with pytest.raises(RunError) as caught:
            llm.generate(prompts_of([40] * 6), SamplingParams(max_tokens=200, ignore_eos=True), observer=trigger)
        noticed_s = time.monotonic() - trigger.at_s
        pids = list(llm.pids.values())
    assert_says(str(caught.value), f"worker {killed} (process ", "was killed by SIGKILL; not answered: requests ")
    assert noticed_s < 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_stopped_engine_is_noticed(wide: Callable[[str], Path], options: dict[str, Any]) -> None:
    with LLM(wide("opt"), mode="mp", kv_memory="4MiB", **options) as llm:
        pids = llm.pids
        trigger = Trigger("decode", lambda: os.kill(pids["decode-0"], signal.SIGSTOP))
        with pytest.raises(RunError, match=r"worker decode-0 \(process \d+, stopped\) does not answer"):
            llm.generate([[5]], SamplingParams(max_tokens=250, ignore_eos=True), observer=trigger)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.fixture
def running(
    tmp_path: Path, wide: Callable[[str], Path], vllm_python: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    segments = abandoned_segments()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    more = ["--backend", "vllm", "--backend_python", vllm_python, "--kernels", "plain", "--kv_memory", "4MiB"]
    run = Running(tmp_path, wide("opt"), options=[*more, "--load_format", "dummy"])
    yield run
    wait_for(lambda: abandoned_segments() <= segments, "end of the shared memory")
    wait_for(lambda: not list(temporary.glob("splitwiser-*")), "end of the checkpoint")
    for pid in session_of(run.process.pid):
        os.kill(pid, signal.SIGKILL)


def test_ctrl_c_ends_every_process_and_keeps_what_was_finished(running: Running) -> None:
    running.wait_until_three_are_finished()
    os.killpg(running.process.pid, signal.SIGINT)
    running.ended()
    assert running.process.returncode == 130
    assert finished(running.results) == [0, 1, 2]
    assert yaml.safe_load((only_run(running.results) / "run.yaml").read_text())["status"] == "interrupted"


def test_a_killed_parent_takes_every_engine_with_it(running: Running) -> None:
    running.wait_until_three_are_finished()
    running.process.kill()
    running.ended()
    assert finished(running.results) == [0, 1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_start_that_ends(number: signal.Signals, running: Running) -> None:
    running.wait_for_stage("last worker")
    running.process.send_signal(number)
    running.ended()
