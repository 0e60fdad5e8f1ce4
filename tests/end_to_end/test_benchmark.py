"""The benchmark's workloads, arithmetic and runs, with stand-ins for the environments of peers."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import benchmark
import pandas as pd
import peer
import pytest

from tests.support.assertions import assert_says, refusal
from tests.support.models import make_tiny

VOCABULARY = 49_100  # the benchmark's prompts have token ids up to 49,000


def lengths(path: Path) -> list[int]:
    return [len(prompt) for prompt in json.loads(path.read_text(encoding="utf-8"))["prompts"]]


# -- workloads


def test_standard_workload_is_the_one_that_was_measured_before(tmp_path: Path) -> None:
    benchmark.write_workload(tmp_path / "w.json", benchmark.WORKLOADS["standard"], seed=0)
    assert (len(lengths(tmp_path / "w.json")), sum(lengths(tmp_path / "w.json"))) == (64, 14_073)


@pytest.mark.parametrize(
    ("name", "requests", "middle", "new_tokens"),
    [("standard", 64, 200, 64), ("long_prompts", 16, 1500, 16), ("long_outputs", 48, 32, 256), ("single", 6, 128, 128)],
)
def test_workload_has_its_shape(name: str, requests: int, middle: int, new_tokens: int, tmp_path: Path) -> None:
    shape = benchmark.WORKLOADS[name]
    benchmark.write_workload(tmp_path / "w.json", shape, seed=0)
    made = lengths(tmp_path / "w.json")
    assert (len(made), shape.new_tokens) == (requests, new_tokens)
    assert median(made) == pytest.approx(middle, rel=0.2)
    assert max(made) + new_tokens <= 2048  # OPT's positions


def test_workload_depends_on_the_seed_alone(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        benchmark.write_workload(path, benchmark.WORKLOADS["single"], seed)
    first, again, other = (path.read_text(encoding="utf-8") for path in paths)
    assert first == again != other


def test_arrivals_at_a_rate_leave_the_prompts_as_they_are(tmp_path: Path) -> None:
    shape = benchmark.WORKLOADS["standard"]
    benchmark.write_workload(tmp_path / "at_once.json", shape, 0)
    benchmark.write_workload(tmp_path / "rate.json", shape, 0, rate=4.0)
    at_once, rate = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("at_once", "rate"))
    assert at_once["prompts"] == rate["prompts"]
    assert rate["arrival_s"][0] == 0
    assert rate["arrival_s"][-1] == pytest.approx(64 / 4, rel=0.4)


def test_options_override_what_a_workload_says() -> None:
    shapes = benchmark.parse(["--workloads", "standard,single", "--requests", "3", "--longest", "20"]).shapes
    assert [(each.requests, each.longest, each.new_tokens) for each in shapes.values()] == [(3, 20, 64), (3, 20, 128)]


def test_options_of_a_run_are_passed_on() -> None:
    assert benchmark.parse(["--max_batch", "8", "--no-lend"]).extra == {"max_batch": 8, "lend": False}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--workloads", "standart"], ["unknown workload 'standart'", "standard"]),
        (["--peers", "vlm=/x"], ["unknown peer 'vlm'", "vllm"]),
        (["--peers", "vllm=/none"], ["--peers vllm=/none", "no bin/python", "install_peer.sh"]),
        (["--mods", "mp"], ["unknown option '--mods'"]),
        (["--mode", "mp"], ["--mode is the benchmark's", "--modes"]),
        (["--repeats", "0"], ["--repeats must be 1 or more"]),
        (["--modes", ""], ["nothing to run"]),
        (["--load", "0.5", "--workloads", "standard,single"], ["--load", "single"]),
        (["--load", "0"], ["--load must be above 0"]),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], parts: list[str]) -> None:
    assert_says(refusal(benchmark.parse, arguments), *parts)


def test_peer_may_be_given_by_its_interpreter() -> None:
    assert benchmark.parse(["--peers", f"hf-continuous={sys.executable}"]).peers == {
        "hf-continuous": Path(sys.executable)
    }


def test_peers_are_refused_where_requests_have_times_of_their_own(tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "env", WRITES_FIGURES)
    for other in (["--load", "0.5"], ["--case_id", "0"]):
        message = refusal(benchmark.parse, ["--peers", f"vllm={environment}", *other])
        assert_says(message, "--peers", "--case_id and --load")


# -- arithmetic


def test_summary_has_medians_and_ratios_round_by_round() -> None:
    def runs(workload: str, contestant: str, throughputs: Sequence[float | None]) -> list[dict[str, Any]]:
        return [
            {"round": number, "model": "m", "workload": workload, "contestant": contestant,
             "status": "finished" if value else "failed", "output_throughput": value, "median_ttft_ms": 2.0}
            for number, value in enumerate(throughputs)
        ]  # fmt: skip

    rows = pd.DataFrame(
        [
            *runs("one", "generate", [10, 20, 40]),
            *runs("one", "sequential", [30, 40, 20]),  # over generate: 3, 2, 0.5
            *runs("one", "vllm", [15, None, 40]),  # 2 and 0.5; the round that failed has none
            *runs("two", "vllm", [5]),  # nothing to be set against
        ]
    ).reindex(columns=["round", "model", "workload", "contestant", "status", *benchmark.SHOWN])
    summary = benchmark.summarise(rows, "sequential").set_index(["workload", "contestant"])
    assert list(summary.index) == [("one", "generate"), ("one", "sequential"), ("one", "vllm"), ("two", "vllm")]
    assert list(summary["tokens/s out"]) == [
        "20.0 (10.0 to 40.0)", "30.0 (20.0 to 40.0)", "27.5 (15.0 to 40.0)", "5.0 (5.0 to 5.0)",
    ]  # fmt: skip
    assert list(summary["sequential over it"]) == [
        "2.00 (0.50 to 3.00)", "1.00 (1.00 to 1.00)", "1.25 (0.50 to 2.00)", "-",
    ]  # fmt: skip
    assert list(summary["sequential is"]) == [
        "undecided (from 0.14 to 14.89)",
        "-",
        "undecided (from 0.00 to 6681.70)",
        "-",
    ]
    assert set(summary["handoff p50 ms"]) == {"-"}
    busy = benchmark.summarise(rows.assign(machine_busy=rows["contestant"] == "generate"), "sequential")
    verdict = busy.set_index(["workload", "contestant"]).at[("one", "generate"), "sequential is"]
    assert verdict == "undecided (busy machine in 3 of 3 rounds)"


# -- runs

WRITES_FIGURES = """
import json, sys
out, asked = sys.argv[sys.argv.index("--output") + 1], sys.argv[2:]
open(out, "w").write(json.dumps({"mode": sys.argv[2], "output_throughput": 100.0, "p99_itl_ms": None, "asked": asked}))
"""
FAILS = """
import sys
print("something on the way", file=sys.stderr)
print("ValueError: it has no heart", file=sys.stderr)
sys.exit(1)
"""


def make_environment(directory: Path, program: str) -> Path:
    """A stand-in for a peer's environment, whose interpreter does what ``program`` says."""
    python = directory / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\n{program}", encoding="utf-8")
    python.chmod(0o755)
    return directory


def small(tiny: Callable[[str], Path], out: Path) -> list[str]:
    return [
        "--models",
        str(tiny("opt")),
        "--load_format",
        "auto",
        "--repeats",
        "2",
        "--requests",
        "2",
        "--out",
        str(out),
    ]


def test_peer_is_asked_what_the_workload_says(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    peers = f"vllm={make_environment(tmp_path / 'env', WRITES_FIGURES)}"
    arguments = [*small(tiny, tmp_path / "out"), "--modes", "", "--peers", peers, "--workloads", "standard,single"]
    assert benchmark.main(arguments) == 0
    rows = pd.read_csv(tmp_path / "out" / "benchmark.csv")
    assert list(zip(rows["round"], rows["workload"], strict=True)) == [
        (0, "standard"), (0, "single"), (1, "standard"), (1, "single"),
    ]  # fmt: skip
    assert set(rows["contestant"]) == {"vllm"}
    assert set(rows["model"]) == {"tiny-opt"}
    standard, single = rows["asked"][:2]
    assert_says(standard, f"'--model', '{tiny('opt')}'", "standard.json", "'--dtype', 'bfloat16'")
    assert "--max_concurrency" not in standard
    assert_says(single, "single.json", "'--max_concurrency', '1'")


def test_peer_that_fails_is_named_and_the_others_go_on(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = make_environment(tmp_path / "broken", FAILS)
    works = make_environment(tmp_path / "works", WRITES_FIGURES)
    peers = f"vllm={broken},hf-continuous={works}"
    assert benchmark.main([*small(tiny, tmp_path / "out"), "--modes", "", "--peers", peers]) == 1
    said = capsys.readouterr().err
    assert_says(
        said, "tiny-opt, standard, vllm: failed: exit code 1: ValueError: it has no heart", "2 of 4 runs failed"
    )
    rows = pd.read_csv(tmp_path / "out" / "benchmark.csv")
    assert list(rows["status"]) == ["failed", "finished"] * 2
    assert list(pd.read_csv(tmp_path / "out" / "summary.csv")["contestant"]) == ["hf-continuous"]


def test_peer_that_writes_nothing_has_failed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    peers = f"vllm={make_environment(tmp_path / 'env', '')}"
    assert benchmark.main([*small(tiny, tmp_path / "out"), "--modes", "", "--peers", peers]) == 1


def test_modes_and_peers_load_one_checkpoint_with_random_weights(tmp_path: Path) -> None:
    model = make_tiny("opt", tmp_path / "wide", vocab_size=VOCABULARY)
    peers = f"vllm={make_environment(tmp_path / 'env', WRITES_FIGURES)}"
    arguments = [
        "--models",
        str(model),
        "--modes",
        "sequential",
        "--peers",
        peers,
        "--dtype",
        "float32",
        "--requests",
        "2",
    ]
    arguments += ["--longest", "20", "--new_tokens", "3", "--workloads", "single", "--kernels", "plain"]
    assert benchmark.main([*arguments, "--repeats", "1", "--out", str(tmp_path / "out")]) == 0
    checkpoint = tmp_path / "out" / "models" / "wide-float32"
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["OPTForCausalLM"]
    rows = pd.read_csv(tmp_path / "out" / "benchmark.csv").set_index("contestant")
    assert rows.loc["sequential", "load_format"] == "auto"
    assert rows.loc["sequential", "total_output_tokens"] == 6
    assert f"'--model', '{checkpoint}'" in str(rows.loc["vllm", "asked"])
    assert set(rows["model"]) == {"wide"}
    written = (checkpoint / "config.json").stat().st_mtime_ns
    assert benchmark.write_checkpoint(str(model), "float32", tmp_path / "out") == str(checkpoint)
    assert (checkpoint / "config.json").stat().st_mtime_ns == written


def test_wrong_mode_is_refused_before_anything_runs(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([*small(tiny, tmp_path), "--modes", "sequential,fast"]) == 2
    assert_says(capsys.readouterr().err, "benchmark: unknown mode 'fast'")
    assert not (tmp_path / "benchmark.csv").exists()


# -- what a peer's process does


class OneTokenAStep:
    """An engine that gives every request a token a step and notes how many it had at most."""

    began_s = 0.0
    version = "0"

    def __init__(self, short: int = 0) -> None:
        self.running: dict[int, int] = {}
        self.most = 0
        self.order: list[int] = []
        self._moment = 0
        self._short = short
        self._asked: dict[int, int] = {}

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        self.order.append(number)
        self.running[number] = 0
        self._asked[number] = new_tokens - self._short
        self.most = max(self.most, len(self.running))

    def collect(self) -> Iterator[peer.Answer]:
        for number in list(self.running):
            self.running[number] += 1
            if self.running[number] == self._asked[number]:
                made = self.running.pop(number)
                yield number, [7] * made, list(range(made))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_requests_in_flight_are_as_many_as_asked_for(concurrency: int) -> None:
    engine = OneTokenAStep()
    outputs = peer.serve(engine, [[1], [2, 3], [4], [5], [6]], [3, 1, 4, 1, 5], concurrency)
    assert engine.most == concurrency
    assert engine.order == [0, 1, 2, 3, 4]
    made = {output.request_id: (output.prompt_token_ids, len(output.token_ids)) for output in outputs}
    assert made == {0: ((1,), 3), 1: ((2, 3), 1), 2: ((4,), 4), 3: ((5,), 1), 4: ((6,), 5)}


def test_requests_that_come_at_once_have_one_arrival() -> None:
    outputs = peer.serve(OneTokenAStep(), [[1], [2], [3]], [2, 2, 2], 3)
    assert len({output.metrics.arrival_ns for output in outputs}) == 1


def test_in_the_closed_loop_a_request_arrives_when_the_last_has_ended() -> None:
    arrivals = [output.metrics.arrival_ns for output in peer.serve(OneTokenAStep(), [[1], [2], [3]], [2, 2, 2], 1)]
    assert arrivals == sorted(set(arrivals))
    assert len(arrivals) == 3


def test_answer_of_another_length_is_a_fault() -> None:
    with pytest.raises(RuntimeError, match="request 0 has 2 tokens instead of 3"):
        peer.serve(OneTokenAStep(short=1), [[1]], [3], 1)
