"""Requests that are cancelled: whatever they are at, each is answered once, and the others are as if they had been alone."""

import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from splitwiser import LLM, SamplingParams
from splitwiser.engine.messages import StepRecord
from splitwiser.request import RequestOutput
from tests.support.observers import Seen, Trigger
from tests.support.tokens import prompts_of, reference, room_for

MODES = ["sequential", "mp", "generate"]
NEW = 24


class Canceller(Seen):
    """Cancels requests at random, after some steps each."""

    def __init__(self, llm: LLM, requests: int, seed: int) -> None:
        super().__init__()
        self.llm = llm
        self.random = random.Random(seed)
        self.requests = requests

    def on_step(self, record: StepRecord) -> None:
        super().on_step(record)
        if self.random.random() < 0.3:
            self.llm.cancel(self.random.randrange(-1, self.requests + 1))  # some twice, and some that there are not


def check(outputs: list[RequestOutput], seen: Seen, prompts: list[list[int]], directory: Path) -> None:
    assert sorted(output.request_id for output in seen.outputs) == list(range(len(prompts)))  # each is answered once
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference(directory, tuple(prompt), NEW)
        tokens = tuple(output.token_ids)
        if output.finish_reason == "cancelled":
            assert tokens == expected[: len(tokens)]
            assert output.metrics.cancelled_ns is not None
            assert len(output.metrics.token_ns) == len(tokens)
            assert output.metrics.cancelled_ns >= max([output.metrics.arrival_ns, *output.metrics.token_ns])
        else:
            assert tokens == expected


@pytest.mark.parametrize(
    ("mode", "counts"),
    [
        ("sequential", {"mixed": 1}),
        ("generate", {}),
        ("mp", {"prefill": 1, "decode": 1}),
        ("mp", {"prefill": 2, "decode": 2}),
        ("mp", {"mixed": 2}),
    ],
)
def test_at_random(mode: str, counts: dict[str, int], tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([40, 3, 17, 60, 9, 25, 1, 33, 12, 50])
    workers = [{"role": role, "count": count} for role, count in counts.items()] if mode == "mp" else ""
    owners = counts.get("decode", 0) + counts.get("mixed", 0)
    settings: dict[str, Any] = {"kv_memory": room_for(tiny("llama"), 208 * owners)} if owners else {"batch_size": 4}
    reasons = set()
    with LLM(tiny("llama"), mode=mode, workers=workers, prefill_tokens=16, **settings) as llm:  # some have to wait
        for seed in range(2):
            seen = Canceller(llm, len(prompts), seed)
            outputs = llm.generate(
                prompts,
                SamplingParams(max_tokens=NEW),
                observer=seen,
                arrival_s=[0.005 * n for n in range(len(prompts))],
            )
            check(outputs, seen, prompts, tiny("llama"))
            reasons |= {output.finish_reason for output in outputs}
        # all blocks are free: requests that need nearly all of them are served (a worker raises if one is not)
        (last,) = llm.generate([prompts[3]], SamplingParams(max_tokens=NEW))
    assert tuple(last.token_ids) == reference(tiny("llama"), tuple(prompts[3]), NEW)
    assert "cancelled" in reasons
    assert len(reasons) > 1


@pytest.mark.parametrize("mode", MODES)
def test_from_another_thread_before_it_arrives(mode: str, tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode=mode) as llm:
        timer = threading.Timer(0.2, llm.cancel, [[1, 2]])
        timer.start()
        began = time.monotonic()
        outputs = llm.generate([[5, 6]] * 3, SamplingParams(max_tokens=4, ignore_eos=True), arrival_s=[0, 3600, 7200])
        assert time.monotonic() - began < 60
        timer.join()
    assert [output.finish_reason for output in outputs] == ["length", "cancelled", "cancelled"]
    assert [(output.token_ids, output.text) for output in outputs[1:]] == [([], "")] * 2


@pytest.mark.parametrize("mode", ["sequential", "mp"])
def test_while_its_prompt_is_prefilled(mode: str, tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode=mode, prefill_tokens=1) as llm:
        trigger = Trigger("prefill", lambda: llm.cancel(0))
        (output,) = llm.generate([[5] * 200], SamplingParams(max_tokens=4), observer=trigger)
    assert output.finish_reason == "cancelled"
    assert output.token_ids == []


@pytest.mark.parametrize("mode", MODES)
def test_a_cancel_without_a_run_or_of_a_finished_one_does_nothing(mode: str, tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode=mode) as llm:
        llm.cancel([0, 1])
        for _ in range(2):
            (output,) = llm.generate([[5, 6]], SamplingParams(max_tokens=4, ignore_eos=True))
            assert (output.finish_reason, len(output.token_ids)) == ("length", 4)
            llm.cancel(0)


def test_the_next_of_a_closed_loop_comes_in_its_place(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt")) as llm:
        trigger = Trigger("decode", lambda: llm.cancel([0, 3]))  # one that runs, and one that is not in yet
        outputs = llm.generate(
            [[5, 6]] * 5, SamplingParams(max_tokens=9, ignore_eos=True), observer=trigger, max_concurrency=1
        )
    assert [output.finish_reason for output in outputs] == ["cancelled", "length", "length", "cancelled", "length"]
    times = [outputs[number].metrics for number in (0, 1, 2, 4)]
    for before, after in pairwise(times):
        assert after.arrival_ns == before.finish_ns
