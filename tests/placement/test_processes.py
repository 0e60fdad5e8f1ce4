"""Mode ``mp``: real processes, real kills, one copy of the memory."""

import gc
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from splitwiser import LLM, SamplingParams
from splitwiser.engine.engine import SplitEngine
from splitwiser.engine.messages import Handoff
from splitwiser.errors import InputError, RunError
from splitwiser.model.kv_pool import KVPool
from splitwiser.placement.processes import MISSED_CHECKS, ProcessPlacement
from tests.support.assertions import assert_says, refusal
from tests.support.commands import finished, only_run
from tests.support.models import make_tiny
from tests.support.observers import Seen, Trigger
from tests.support.processes import abandoned_segments, session_of, wait_for
from tests.support.running import Running
from tests.support.tokens import LENGTHS, prompts_of, references, room_for

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "two of each": [{"role": "prefill", "count": 2}, {"role": "decode", "count": 2}],
    "three mixed": [{"role": "mixed", "count": 3}],
    "shares": [{"role": "prefill", "share": 30}, {"role": "decode", "count": 2, "share": 35}],
}


def placement_of(llm: LLM) -> ProcessPlacement:
    assert isinstance(llm._engine, SplitEngine)
    assert isinstance(llm._engine._placement, ProcessPlacement)
    return llm._engine._placement


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["opt", "mistral"])
def test_tokens_do_not_depend_on_the_workers(name: str, layout: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS, seed=5)
    rng = random.Random(1)
    arrivals = [rng.random() * 0.3 for _ in prompts]
    memory = room_for(tiny(name), 3 * 144)
    with LLM(tiny(name), mode="mp", workers=LAYOUTS[layout], prefill_tokens=24, kv_memory=memory) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24), arrival_s=arrivals)
    assert [output.token_ids for output in outputs] == references(tiny(name), prompts, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["opt", "mistral"])
def test_tokens_on_a_gpu_do_not_depend_on_the_workers(name: str, layout: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS, seed=5)
    made = []
    placements: list[dict[str, Any]] = [{}, {"mode": "mp", "workers": LAYOUTS[layout]}]
    for settings in placements:
        with LLM(tiny(name), device="cuda", dtype="float32", **settings) as llm:
            made.append([output.token_ids for output in llm.generate(prompts, SamplingParams(max_tokens=20))])
    assert made[0] == made[1]


@pytest.mark.gpu
@pytest.mark.alone
def test_weights_on_a_gpu_count_once_however_many_workers() -> None:
    used = []
    for count in (1, 3):
        free_before = torch.cuda.mem_get_info()[0]
        workers = [{"role": "mixed", "count": count}]
        settings: dict[str, Any] = {"load_format": "dummy", "dtype": "bfloat16", "device": "cuda"}
        with LLM("llama-3.2-1b", mode="mp", workers=workers, kv_memory="256MiB", **settings) as llm:
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
            used.append(free_before - torch.cuda.mem_get_info()[0])
        torch.cuda.empty_cache()
    contexts = used[1] - used[0]  # a CUDA context and its libraries take several hundred megabytes, the weights 2,472
    assert contexts < 2 * 1.8e9, f"two workers more take {contexts / 1e6:.0f} MB"


def test_sampled_tokens_do_not_depend_on_the_workers(tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS, seed=6)
    params = [SamplingParams(max_tokens=16, temperature=1.1, top_p=0.95, seed=number) for number in range(len(prompts))]
    made = []
    for settings in ({}, {"mode": "mp"}, {"mode": "mp", "workers": LAYOUTS["two of each"], "max_batch": 2}):
        with LLM(tiny("llama"), **settings) as llm:
            made.append([output.token_ids for output in llm.generate(prompts, params)])
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("settings", [{}, {"prefix_caching": True}, {"policy": "shortest_prompt"}])
def test_tokens_do_not_depend_on_a_second_lane(settings: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    prompts = [[1, 2, 3] * 12 + prompt for prompt in prompts_of([30] * 60, seed=7)]
    seen = Seen()
    with LLM(tiny("llama"), mode="mp", prefill_tokens=70, **settings) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), observer=seen)
        assert "a step every 85 ms" in llm.started.kernels["second_lane"]
    assert {step.worker for step in seen.steps} == {"prefill-0", "prefill-0-second", "decode-0"}
    with LLM(tiny("llama")) as llm:
        expected = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


@pytest.mark.parametrize(("target_ms", "level"), [(0.001, 2), (1e6, 0)])
def test_auto_moves_cores_to_the_phase_that_needs_them(
    target_ms: float, level: int, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})  # three ways to cut four cores
    prompts = prompts_of([100] * 60, seed=7)
    with LLM(tiny("llama"), mode="mp", share="auto", itl_target_ms=target_ms, prefill_tokens=100) as llm:
        assert llm.started.division == [{"prefill-0": 4 - units, "decode-0": units} for units in (1, 2, 3)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=30, ignore_eos=True))
        assert placement_of(llm)._board.level == level
    with LLM(tiny("llama")) as llm:
        expected = llm.generate(prompts, SamplingParams(max_tokens=30, ignore_eos=True))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_every_worker_takes_part(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="mp", workers=LAYOUTS["two of each"]) as llm:
        outputs = llm.generate(prompts_of([20] * 12), SamplingParams(max_tokens=8, ignore_eos=True))
    assert {output.metrics.prefill_worker for output in outputs} == {"prefill-0", "prefill-1"}
    assert {output.metrics.decode_worker for output in outputs} == {"decode-0", "decode-1"}


@pytest.mark.parametrize(
    ("workers", "line"),
    [
        ([{"role": "prefill"}], "workers: no decode worker"),
        ([{"role": "prefill", "share": 60}, {"role": "decode", "share": 50}], "workers: the shares make 110%"),
        ("[{role: decoder}]", "'role' must be one of prefill, decode, mixed, not 'decoder'"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(
    workers: str | list[dict[str, Any]], line: str, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(InputError, match=line):
        LLM(tiny("opt"), mode="mp", workers=workers)


def test_a_pace_that_a_model_cannot_have_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(
        InputError, match="itl_target_ms 20 in mode mp is for decoders without rotary scaling by length"
    ):
        LLM(tiny("t5"), mode="mp", itl_target_ms=20)


def test_workers_in_another_mode_are_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="workers are laid out in modes mp, mps, green, not in mode sequential"):
        LLM(tiny("opt"), workers="[{role: mixed}]")


def test_a_pool_smaller_than_the_decode_workers_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="holds 1 blocks, which is less than one for each decode worker"):
        LLM(tiny("opt"), mode="mp", workers=LAYOUTS["three mixed"], kv_memory=room_for(tiny("opt"), 16))


def test_a_request_larger_than_one_workers_part_is_refused(tiny: Callable[[str], Path]) -> None:
    memory = room_for(tiny("opt"), 3 * 32)
    with LLM(tiny("opt"), mode="mp", workers=LAYOUTS["three mixed"], kv_memory=memory) as llm:
        params = SamplingParams(max_tokens=1)
        assert llm.make_requests([[5] * 32], params)
        with pytest.raises(InputError, match="need room for 48 tokens in the KV pool, which holds 32"):
            llm.make_requests([[5] * 48], params)


# -- one copy of the memory


def proportional_mib(pids: Sequence[int]) -> float:
    """Proportional set size of ``pids`` together: a page that n processes map counts 1/n in each."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


MEASURE_MEMORY = """
import sys
from splitwiser import LLM, SamplingParams
workers = [{"role": "mixed", "count": int(sys.argv[1])}]
with LLM("opt-125m", mode="mp", load_format="dummy", workers=workers) as llm:
    llm.generate([[5] * 100] * 8, SamplingParams(max_tokens=2, ignore_eos=True))
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_weights_and_pool_count_once_however_many_workers() -> None:
    sizes = {}
    for count in (1, 3):
        process = subprocess.Popen(
            [sys.executable, "-c", MEASURE_MEMORY, str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        sizes[count] = proportional_mib(session_of(process.pid))
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    weights_mib = 125_239_296 * 4 / 2**20  # float32
    overhead_mib = 80  # a process's own heap and what it touched last; far below the 478 MiB of weights
    assert weights_mib < sizes[1]
    assert sizes[3] - sizes[1] < 2 * overhead_mib, sizes


def test_requests_take_of_each_part_of_the_pool_what_they_can_use_at_once(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[range] = []
    monkeypatch.setattr(KVPool, "prefault", lambda _, blocks: taken.append(blocks))
    with LLM(tiny("opt"), mode="mp", workers=LAYOUTS["three mixed"], kv_memory="1MiB", max_batch=5) as llm:
        assert llm.started.pool is not None
        part = llm.started.pool.blocks // 3
        assert taken == []  # nothing is known of the requests yet
        llm.make_requests([[5] * 20] * 20, SamplingParams(max_tokens=13))  # two blocks each, 15 requests at a time
        llm.make_requests([[5] * 250], SamplingParams(max_tokens=1))
        llm.make_requests([], [])
    assert taken[:3] == [range(first, first + 12) for first in (0, part, 2 * part)]
    assert len(taken) == 6
    assert max(map(len, taken)) <= part


def test_the_pool_is_the_same_memory_in_every_process(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="mp", kv_memory="8MiB") as llm:
        assert llm.started.pool is not None
        llm.generate([[5] * 20], SamplingParams(max_tokens=4, ignore_eos=True))
        written = [bool(keys.any()) for keys in llm.started.pool.keys]  # by the workers, seen by the parent
        mappings = []
        for pid in [*llm.pids.values(), os.getpid()]:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            mappings.append({line.split()[4] for line in lines if "memfd:splitwiser" in line})
    assert all(written)
    assert len(mappings[0]) == 3  # weights, pool and board, by inode
    assert mappings[0] == mappings[1]
    assert mappings[0] <= mappings[2]


def test_a_closed_one_leaves_nothing_of_its_memory(tiny: Callable[[str], Path]) -> None:
    def handles() -> int:
        links = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        return sum("memfd:splitwiser" in link for link in links)

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:splitwiser")

    gc.collect()
    before = handles(), mapped()
    llm = LLM(tiny("opt"), mode="mp", kv_memory="1MiB")
    assert handles() == before[0]  # workers have their own by now
    assert mapped() > before[1]
    llm.close()
    del llm
    gc.collect()
    assert (handles(), mapped()) == before


# -- the phases at the same time


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("long") / "tiny-llama-8k", max_position_embeddings=8192)


@pytest.mark.parametrize(
    ("mode", "new_tokens", "fewest", "most"), [("mp", 4000, 5, 10_000), ("sequential", 1000, 0, 0)]
)
def test_decode_goes_on_while_a_long_prompt_is_prefilled(
    mode: str, new_tokens: int, fewest: int, most: int, long_context: Path
) -> None:
    seen = Seen()
    prompts = [[7] * 10, [9] * 7000]
    params = [SamplingParams(max_tokens=new_tokens, ignore_eos=True), SamplingParams(max_tokens=1)]
    with LLM(long_context, mode=mode, prefill_tokens=8192, kv_memory="64MiB") as llm:
        outputs = llm.generate(prompts, params, arrival_s=[0.0, 0.3], observer=seen)
    (long_step,) = [step for step in seen.steps if step.phase == "prefill" and step.tokens == 7000]
    during = [
        step
        for step in seen.steps
        if step.phase == "decode" and step.start_ns > long_step.start_ns and step.end_ns < long_step.end_ns
    ]
    assert outputs[0].metrics.token_ns[-1] > long_step.end_ns  # it was running all the while
    assert fewest <= len(during) <= most


def test_five_hundred_requests_through_a_small_pool(tiny: Callable[[str], Path]) -> None:
    rng = random.Random(7)
    lengths = [rng.randint(1, 60) for _ in range(500)]
    new_tokens = [rng.randint(1, 20) for _ in lengths]
    params = [SamplingParams(max_tokens=each, ignore_eos=True) for each in new_tokens]
    arrivals = [rng.random() * 3 for _ in lengths]
    blocks = sum(-(-(length + new) // 16) for length, new in zip(lengths, new_tokens, strict=True)) // 10
    seen = Seen()
    with LLM(tiny("opt"), mode="mp", kv_memory=room_for(tiny("opt"), 16 * blocks)) as llm:
        outputs = llm.generate(prompts_of(lengths), params, arrival_s=arrivals, observer=seen)
        # the whole pool is free again: a request that takes all of it (and all positions) is served
        whole = min(blocks * 16, 256)
        (last,) = llm.generate([[5] * (whole - 1)], SamplingParams(max_tokens=2, ignore_eos=True))
    assert sorted(output.request_id for output in seen.outputs) == list(range(500))
    assert [len(output.token_ids) for output in outputs] == new_tokens
    assert len(last.token_ids) == 2


def test_more_workers_than_can_have_pipes_are_refused_before_a_model_is_loaded() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, limits[1]))
    try:
        line = refusal(LLM, "none/such", mode="mp", workers=[{"role": "mixed", "count": 100_000}])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert_says(line, "100,000 processes are more than the 20 that", "may open 1,000 files (ulimit -n)")


def test_room_of_what_ended_is_room_again(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="mp", workers=[{"role": "mixed", "count": 2}]) as llm:
        used = []
        for prompts in ([[5] * 200, [6]], [[5], [6]]):
            outputs = llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True))
            used.append([output.metrics.decode_worker for output in outputs])
    assert used == [["mixed-0", "mixed-1"]] * 2


def test_a_handoff_is_measured(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="mp") as llm:
        outputs = llm.generate(
            [[5] * 9, [6]], [SamplingParams(max_tokens=3, ignore_eos=True), SamplingParams(max_tokens=1)]
        )
    first, second, _ = outputs[0].metrics.token_ns
    assert outputs[0].metrics.handoff_ms is not None
    assert 0 < outputs[0].metrics.handoff_ms < (second - first) / 1e6  # the gap's rest is the step itself
    assert outputs[1].metrics.handoff_ms is None  # it never took a decode step


# -- ends of every kind


def test_workers_that_are_told_to_end_do_so_by_themselves(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="mp", kv_memory="1MiB") as llm:
        workers = placement_of(llm)._processes
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.parametrize("killed", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_killed_worker_is_noticed_within_a_second_and_named(
    phase: str, killed: str, tiny: Callable[[str], Path]
) -> None:
    with LLM(tiny("opt"), mode="mp", prefill_tokens=16) as llm:
        trigger = Trigger(phase, lambda: os.kill(llm.pids[killed], signal.SIGKILL))
        with pytest.raises(RunError) as caught:
            llm.generate(prompts_of([40] * 6), SamplingParams(max_tokens=200, ignore_eos=True), observer=trigger)
        noticed_s = time.monotonic() - trigger.at_s
        pids = list(llm.pids.values())
    assert f"worker {killed} (process " in str(caught.value)
    assert "was killed by SIGKILL; not answered: requests 0, 1, 2, 3, 4, 5" in str(caught.value)
    assert noticed_s < 1 + 1  # a second to notice, and one for a busy machine
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_stopped_worker_is_noticed(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="mp") as llm:
        pids = llm.pids
        trigger = Trigger("decode", lambda: os.kill(pids["decode-0"], signal.SIGSTOP))
        with pytest.raises(RunError, match=r"worker decode-0 \(process \d+, stopped\) does not answer"):
            llm.generate([[5]], SamplingParams(max_tokens=250, ignore_eos=True), observer=trigger)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


def test_a_worker_counts_as_lost_for_its_silence_only_once_it_is_ready(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="mp", kv_memory="1MiB") as llm:
        placement = placement_of(llm)
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2))

        def checks(count: int) -> list[str]:
            found = []
            for _ in range(count):
                placement._next_check_s = 0.0
                found.append(str(placement._find_lost_worker() or ""))
            return found

        placement._board.heartbeats = lambda: [7, 7]  # type: ignore[method-assign]  # CUDA's start holds the interpreter's lock
        placement._ready.clear()
        assert checks(MISSED_CHECKS + 2) == [""] * (MISSED_CHECKS + 2)
        placement._ready.update(placement.pids)
        assert "does not answer" in checks(MISSED_CHECKS)[-1]


def test_an_exception_in_a_worker_is_reported_with_its_traceback(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="mp") as llm:
        nobodys = Handoff(99, 1, 1, 2, "prefill-0")
        trigger = Trigger("prefill", lambda: placement_of(llm)._send_ends["decode-0"].send(nobodys))
        with pytest.raises(RunError, match="worker decode-0 failed: KeyError: 99; not answered: requests 0") as caught:
            llm.generate([[5]], SamplingParams(max_tokens=250, ignore_eos=True), observer=trigger)
    assert "in _handle" in "".join(caught.value.__notes__)


# interrupted and terminated runs: test_mps_daemon.py, whose runs are these with a daemon beside, and test_cli.py


@pytest.fixture
def running(tmp_path: Path, tiny: Callable[[str], Path]) -> Iterator[Running]:
    segments = abandoned_segments()
    run = Running(tmp_path, tiny("opt"))
    yield run
    wait_for(lambda: abandoned_segments() <= segments, "end of the shared memory")
    for pid in session_of(run.process.pid):
        os.kill(pid, signal.SIGKILL)


def test_a_run_whose_worker_is_killed_ends_with_exit_code_1(running: Running) -> None:
    running.wait_until_three_are_finished()
    os.kill(running.worker("decode-0"), signal.SIGKILL)
    errors = running.ended()
    assert running.process.returncode == 1
    assert "worker decode-0 (process" in errors
    assert "was killed by SIGKILL; not answered: requests 3" in errors
    assert "Traceback" not in errors
    assert finished(running.results) == [0, 1, 2]
    record = yaml.safe_load((only_run(running.results) / "run.yaml").read_text())
    assert (record["status"], record["unanswered"]) == ("failed", [3])


def test_ctrl_c_before_the_command_has_started_ends_every_process(running: Running) -> None:
    os.killpg(running.process.pid, signal.SIGINT)
    running.ended()
    assert running.process.returncode in (130, -signal.SIGINT, 1)  # the latter two while Python starts


def test_a_killed_parent_takes_every_process_with_it(running: Running) -> None:
    running.wait_until_three_are_finished()
    running.process.kill()
    running.ended()
    assert finished(running.results) == [0, 1, 2]
