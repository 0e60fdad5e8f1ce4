"""Two workers in threads of one process: tokens, faults and their end. Mode ``green`` needs a GPU; these do not."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from splitwiser.engine.engine import Observer, SplitEngine
from splitwiser.engine.messages import StepRecord
from splitwiser.errors import RunError
from splitwiser.model.loading import load_model
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.threads import start_threads
from splitwiser.request import Request, SamplingParams
from tests.support.tokens import LENGTHS, SERVED, prompts_of, references

CONFIG = EngineConfig(mode="green", max_batch=8, prefill_tokens=48, kv_memory="4MiB", share="none")


class WholeDevice:
    """A division in which each worker has the whole device; notes what it is told."""

    def __init__(self, fault: str = "") -> None:
        self.units: list[dict[str, int]] = []
        self.gaps: list[float] = []
        self.left: set[str] = set()
        self._fault = fault

    def streams(self, worker: str) -> list[torch.cuda.Stream]:
        return []

    def share(self, worker: str) -> "_Share":
        return _Share(self, worker, self._fault == worker)

    def observe(self, gap_s: float) -> None:
        self.gaps.append(gap_s)


class _Share:
    def __init__(self, division: WholeDevice, name: str, faulty: bool) -> None:
        self._division = division
        self._name = name
        self._faulty = faulty

    def use(self) -> AbstractContextManager[object]:
        if self._faulty:
            raise ValueError("no such stream")
        return nullcontext()

    def release(self) -> None:
        self._division.left.add(self._name)


@contextmanager
def engine_over(directory: Path, division: WholeDevice) -> Iterator[SplitEngine]:
    model = load_model(directory, dtype="float32", device="cpu", load_format="auto")
    engine = start_threads(model, CONFIG, division).engine
    assert isinstance(engine, SplitEngine)
    try:
        yield engine
    finally:
        engine.close()


def requests(new_tokens: int) -> list[Request]:
    params = SamplingParams(max_tokens=new_tokens)
    return [Request(number, tuple(prompt), params, 0) for number, prompt in enumerate(prompts_of(LENGTHS))]


class Steps(Observer):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)


@pytest.mark.parametrize("name", SERVED)
def test_tokens_are_those_of_generate(name: str, tiny: Callable[[str], Path]) -> None:
    with engine_over(tiny(name), WholeDevice()) as engine:
        outputs = engine.run(requests(20), Observer(), time.perf_counter_ns())
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts_of(LENGTHS), 20)


def test_each_worker_runs_its_phase_and_rests_without_work(tiny: Callable[[str], Path]) -> None:
    steps, division = Steps(), WholeDevice()
    with engine_over(tiny("opt"), division) as engine:
        engine.run(requests(6), steps, time.perf_counter_ns())
    assert {(record.worker, record.phase) for record in steps.records} == {
        ("prefill-0", "prefill"),
        ("decode-0", "decode"),
    }
    assert division.left == {"prefill-0", "decode-0"}
    decoded = [record for record in steps.records if record.phase == "decode"]
    assert 0 < len(division.gaps) < len(decoded)  # a gap needs two steps, and ends where nothing runs on
    assert max(division.gaps) <= (decoded[-1].end_ns - decoded[0].start_ns) / 1e9


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_fault_in_a_worker_ends_the_run_with_its_name(name: str, tiny: Callable[[str], Path]) -> None:
    with (
        engine_over(tiny("opt"), WholeDevice(fault=name)) as engine,
        pytest.raises(RunError, match=f"worker {name} failed: ValueError: no such stream; not answered: requests 0"),
    ):
        engine.run(requests(6), Observer(), time.perf_counter_ns())


def test_closing_ends_the_threads(tiny: Callable[[str], Path]) -> None:
    before = set(threading.enumerate())
    with engine_over(tiny("opt"), WholeDevice()):
        assert {thread.name for thread in set(threading.enumerate()) - before} == {"prefill-0", "decode-0"}
    assert set(threading.enumerate()) == before
