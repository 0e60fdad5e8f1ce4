"""Comparisons: what they refuse, and real ones with real processes, failures and kills."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from splitwiser.cli import main
from splitwiser.config import RunConfig
from splitwiser.results.answer import answer
from splitwiser.results.paired import decide, summarise
from splitwiser.results.schema import METRIC
from splitwiser.study.compare import Variant, _turns, compare, conclude, make_variants
from tests.support.assertions import assert_says, refusal
from tests.support.commands import COMMAND, invoke, only_run, write_workload
from tests.support.models import VOCABULARY
from tests.support.processes import processes_naming, session_of, wait_for

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7], [8], [9, 10], [11] * 20]


# -- what is refused


@pytest.mark.parametrize(
    ("modes", "described", "parts"),
    [
        (["mp"], [], ["two variants or more", "--modes", "--variant"]),
        (["mp", "mp"], [], ["two variants are named 'mp'"]),
        (["mp"], ["--mode generate"], ["--variant '--mode generate'", "a name, a colon and options"]),
        (["mp"], ["a/b: --mode mp"], ["a name, a colon and options"]),
        (["mp"], ["four: --wrokers x"], ["--variant four: unknown option '--wrokers'", "--workers"]),
        (["mp"], ["four: --max_batch x"], ["--variant four: ", "--max_batch", "'x'"]),
        (["mp"], ["four: --results x"], ["--variant four: --results is the comparison's"]),
    ],
)
def test_variants_that_make_no_sense_are_refused(modes: list[str], described: list[str], parts: list[str]) -> None:
    assert_says(refusal(make_variants, {}, modes, described), *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"mode": "fast"}, ["variant last: unknown mode 'fast'"]),
        ({"mode": "green"}, ["variant last: mode green"]),
        ({"workers": "[{role: mixed}]"}, ["variant last: --workers"]),
        ({"dtype": "float31"}, ["variant last: unknown --dtype 'float31'"]),
        ({"max_batch": 0}, ["variant last: --max_batch must be 1 or more"]),
        ({"kv_memory": "much"}, ["variant last: --kv_memory 'much'"]),
        ({"limit": 0}, ["variant last: --limit must be 1 or more"]),
        ({"top_p": 2.0}, ["variant last: --top_p"]),
        ({"workload": "none.json"}, ["variant last: ", "none.json: no such file"]),
        ({"limit": 3}, ["variant last differs from first in its requests", "sweep"]),
        ({"max_new_tokens": 3}, ["variant last differs from first in its sampling"]),
        ({"adapters": "lora"}, ["variant last differs from first in its adapters"]),
        ({"seed": 3}, ["variant last differs from first in its seed"]),
        ({"load_format": "dummy"}, ["variant last differs from first in its load_format"]),
        ({"model": "MODEL"}, ["variant last differs from first in its model"]),
    ],
)
def test_a_wrong_last_variant_is_refused_before_anything_runs(
    options: dict[str, Any], parts: list[str], tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    if "model" in options:
        options = {"model": str(tiny("opt"))}
    base: dict[str, Any] = {"results": str(tmp_path / "out"), "limit": 2}
    variants = [Variant("first", base), Variant("same", base), Variant("last", base | options)]
    assert_says(refusal(compare, variants, 1), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "load", "parts"),
    [
        ({}, 0.0, ["load must be above 0", "not 0"]),
        ({"request_rate": 2.0}, 0.6, ["variant first: a load sets when requests arrive", "leave --request_rate out"]),
        (
            {"max_concurrency": 1},
            0.6,
            ["variant first: a load sets when requests arrive", "leave --max_concurrency out"],
        ),
    ],
)
def test_a_load_is_refused_where_requests_have_times_of_their_own(
    options: dict[str, Any], load: float, parts: list[str], tmp_path: Path
) -> None:
    base: dict[str, Any] = {"results": str(tmp_path / "out"), "limit": 2, **options}
    variants = [Variant("first", base), Variant("last", base)]
    assert_says(refusal(compare, variants, 1, load=load), *parts)
    assert not (tmp_path / "out").exists()


def test_options_of_all_and_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "splitwiser.study.compare.compare", lambda *arguments, **named: given.extend([*arguments, named])
    )
    line = (
        "compare --modes mp --limit 3 --max-batch 9 --variant 'four: --mode mp --max_batch 4' --repeats 2 --minutes 5 "
        "--load 0.6"
    )
    assert main(shlex.split(line)) == 0
    assert given == [
        [
            Variant("mp", {"limit": 3, "max_batch": 9, "mode": "mp"}),
            Variant("four", {"limit": 3, "max_batch": 4, "mode": "mp"}),
        ],
        2,
        5.0,
        {"load": 0.6, "one_process": False},
    ]


def test_each_mode_on_each_back_end_is_a_variant() -> None:
    base = {"limit": 3, "backend_python": "there"}
    variants = make_variants(base, ["sequential", "mp"], [], (), ["hf", "vllm"])
    assert [(each.name, each.options["backend"], each.options["mode"]) for each in variants] == [
        ("hf-sequential", "hf", "sequential"),
        ("hf-mp", "hf", "mp"),
        ("vllm-sequential", "vllm", "sequential"),
        ("vllm-mp", "vllm", "mp"),
    ]
    assert [each.options["backend_python"] for each in variants] == [None, None, "there", "there"]
    assert_says(refusal(make_variants, {}, [], [], (), ["hf", "vllm"]), "--backends are compared in modes", "--modes")


# -- a real one


@dataclass(frozen=True)
class Compared:
    done: subprocess.CompletedProcess[str]
    folder: Path
    rows: pd.DataFrame


@pytest.fixture(scope="module")
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Two variants, two rounds."""
    request.getfixturevalue("runs_here")
    model: Path = request.getfixturevalue("tiny")("opt")
    directory = tmp_path_factory.mktemp("compared")
    workload = write_workload(directory / "four.json", PROMPTS, 6)
    done = invoke(
        "compare", "--modes", "sequential", "--variant", "padded: --mode generate --batch_size 2", "--repeats", "2",
        "--model", model, "--workload", workload, "--ignore_eos", "--results", directory / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = only_run(directory / "out")
    return Compared(done, folder, pd.read_csv(folder / "comparison.csv"))


def test_a_round_starts_one_variant_later_than_the_one_before(compared: Compared) -> None:
    order = list(compared.rows[["round", "variant", "mode"]].itertuples(index=False, name=None))
    one, other = ("sequential", "sequential"), ("padded", "generate")
    assert order == [(1, *one), (1, *other), (2, *other), (2, *one)]
    started = [
        yaml.safe_load((compared.folder / "runs" / run / "run.yaml").read_text())["started"]
        for run in compared.rows["run_id"]
    ]
    assert started == sorted(started)


def test_no_round_but_the_first_begins_after_the_time_given() -> None:
    one, other = Variant("one", {}), Variant("other", {})
    assert list(_turns([one, other], 3, time.monotonic() - 1)) == [(1, one), (1, other)]
    assert len(list(_turns([one, other], 3, time.monotonic() + 60))) == 6


def test_a_row_is_its_runs_row_of_throughput(compared: Compared) -> None:
    assert compared.rows["status"].tolist() == ["finished"] * 4
    for _, row in compared.rows.iterrows():
        own = pd.read_csv(compared.folder / "runs" / row["run_id"] / "throughput.csv").iloc[0]
        assert row[own.index].dropna().to_dict() == own.dropna().to_dict()


def test_the_summary_is_of_those_rows(compared: Compared) -> None:
    summary = pd.read_csv(compared.folder / "comparison_summary.csv").set_index(["metric", "variant"])
    rows = compared.rows.sort_values("round")
    for metric in ("output_throughput", "p99_itl_ms", "peak_memory_mb"):
        first, other = (rows[rows["variant"] == name][metric].to_numpy() for name in ("sequential", "padded"))
        row: Any = summary.loc[(metric, "padded")]
        assert row["median"] == pytest.approx(np.median(other))
        assert (row["least"], row["greatest"]) == pytest.approx((other.min(), other.max()))
        assert row["ratio_median"] == pytest.approx(np.median(other / first))
        busy = [number for number, each in enumerate(rows["machine_busy"]) if str(each) == "True"]
        verdict = decide(metric, dict(enumerate(other / first)), {number // 2 for number in busy})
        assert row["verdict"] == verdict
        assert str(verdict) in compared.done.stdout
        assert METRIC[metric].title_with_unit in compared.done.stdout


def test_tokens_of_all_runs_are_held_against_the_first(compared: Compared) -> None:
    tokens = pd.read_csv(compared.folder / "comparison_tokens.csv")
    assert tokens["run_id"].tolist() == compared.rows["run_id"].tolist()
    assert tokens[["requests", "other_prompts", "differ", "must_match"]].drop_duplicates().values.tolist() == [
        [4, 0, 0, True]
    ]
    assert "tokens: the same for all 4 requests in every run" in compared.done.stdout


def test_the_record_repeats_the_comparison(compared: Compared) -> None:
    record = yaml.safe_load((compared.folder / "compare.yaml").read_text())
    assert (record["status"], record["repeats"]) == ("finished", 2)
    assert record["versions"]["torch"]
    assert record["machine"]["cores"] >= 1
    assert {name: RunConfig(**options).mode for name, options in record["variants"].items()} == {
        "sequential": "sequential",
        "padded": "generate",
    }
    given: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitwiser.study.compare.compare", lambda *arguments, **_: given.extend(arguments))
        assert main(shlex.split(record["command"])[1:]) == 0
    assert {variant.name: variant.config for variant in given[0]} == {
        name: RunConfig(**options) for name, options in record["variants"].items()
    }
    assert given[1] == 2


def concluded(
    compared: Compared, tmp_path: Path, *, column: str = "token_ids", temperature: float = 0, **changes: object
) -> tuple[list[str], pd.DataFrame]:
    """The faults and the table of tokens when a token in ``column`` of the second run is another, and its row has
    ``changes``."""
    folder = tmp_path / "copy"
    shutil.copytree(compared.folder, folder)
    rows: list[Any] = compared.rows.to_dict("records")
    path = folder / "runs" / rows[1]["run_id"] / "tokens.csv"
    tokens = pd.read_csv(path, dtype=str)
    request = tokens.index[tokens["request_id"] == "2"][0]
    *others, last = tokens.loc[request, column].split()
    tokens.loc[request, column] = " ".join([*others, str((int(last) + 1) % VOCABULARY)])
    tokens.to_csv(path, index=False)
    rows[1] |= changes
    variants = [Variant(name, {"temperature": temperature}) for name in ("sequential", "padded")]
    return conclude(folder, variants, rows), pd.read_csv(folder / "comparison_tokens.csv")


def test_another_token_in_float32_is_a_fault(compared: Compared, tmp_path: Path) -> None:
    faults, tokens = concluded(compared, tmp_path)
    assert faults == ["padded differs from sequential in 1 of 4 requests, first at token 5 (median)"]
    assert tokens["differ"].tolist() == [0, 1, 0, 0]
    assert tokens["first_difference"][1] == 5


def test_another_token_in_bfloat16_is_only_said(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults, tokens = concluded(compared, tmp_path, dtype="bfloat16")
    assert faults == []
    assert tokens["must_match"].tolist() == [True, False, True, True]
    assert "tokens: padded differs from sequential in 1 of 4 requests" in capsys.readouterr().out


def test_another_token_that_was_sampled_is_only_said(compared: Compared, tmp_path: Path) -> None:
    faults, tokens = concluded(compared, tmp_path, temperature=1.0)
    assert faults == []
    assert tokens["must_match"].tolist() == [False] * 4


def test_another_prompt_is_a_fault_however_it_was_drawn(compared: Compared, tmp_path: Path) -> None:
    faults, _ = concluded(compared, tmp_path, column="prompt_token_ids", temperature=1.0)
    assert faults == ["padded was given 1 other prompts than sequential"]


def test_figures_of_a_stand_in_are_not_set_against_others(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(compared.folder, folder)
    (folder / "comparison_summary.csv").unlink()
    rows: list[Any] = compared.rows.to_dict("records")
    for row in rows[::2]:
        row["device"] = "cuda:0 (stand-in)"
    assert conclude(folder, [Variant("sequential", {}), Variant("padded", {})], rows) == []
    assert "figures: withheld" in capsys.readouterr().out
    assert not (folder / "comparison_summary.csv").exists()


def test_a_busy_machine_is_said_and_its_ratios_are_undecided(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(compared.folder, folder)
    rows = compared.rows.assign(machine_busy=[False, True, False, False], others_cores=1.62, cores=2.0)
    rows.to_csv(folder / "comparison.csv", index=False)
    records: list[Any] = rows.to_dict("records")
    conclude(folder, [Variant("sequential", {}), Variant("padded", {})], records)
    said = capsys.readouterr().out
    assert_says(
        said, "undecided (busy machine in 1 of 2 rounds)", "busy: the machine was busy in 1 of 4 runs: variant "
    )
    assert "padded in round 1; other processes used up to 1.6 of 2 cores" in said
    lines = said.splitlines()
    after_table = 1 + max(number for number, line in enumerate(lines) if line.strip().startswith("padded "))
    assert lines[after_table] == answer(summarise(rows, ["sequential", "padded"]))
    summary = pd.read_csv(folder / "comparison_summary.csv").set_index(["metric", "variant"])
    assert summary.at[("output_throughput", "padded"), "verdict"] == "undecided (busy machine in 1 of 2 rounds)"


@pytest.mark.usefixtures("runs_here")
def test_a_variant_that_fails_leaves_the_others_going(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    workload = write_workload(tmp_path / "two.json", [[5, 6], [7]])
    done = invoke(
        "compare", "--modes", "sequential,generate", "--repeats", "1", "--model", tiny("roformer"), "--workload", workload,
        "--ignore_eos", "--results", tmp_path / "out",
    )  # fmt: skip
    folder = only_run(tmp_path / "out")
    assert done.returncode == 1
    assert "1 of 2 runs failed" in done.stderr.splitlines()[-1]
    rows = pd.read_csv(folder / "comparison.csv")
    assert rows["status"].tolist() == ["failed", "finished"]
    assert "roformer" in rows["error"][0].lower()
    assert rows["error"][0] in done.stderr
    assert "not compared, since no run of sequential finished" in done.stdout
    summary = pd.read_csv(folder / "comparison_summary.csv")
    assert set(summary["rounds"]) == {0, 1}


@pytest.mark.usefixtures("runs_here")
def test_a_load_is_a_part_of_what_the_first_variant_answers_at_once(
    tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    workload = write_workload(tmp_path / "two.json", [[5, 6], [7]], arrival_s=[0, 3600])
    done = invoke(
        "compare", "--modes", "sequential,generate", "--repeats", "1", "--load", "0.5", "--model", tiny("opt"),
        "--workload", workload, "--ignore_eos", "--results", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path / "out")
    record = yaml.safe_load((folder / "compare.yaml").read_text())
    assert (record["load"], record["capacity"]["variant"]) == (0.5, "sequential")
    capacity = record["capacity"]["requests_per_s"]
    assert f"capacity of sequential: {capacity:.4g} requests/s" in done.stdout
    rate = pytest.approx(capacity / 2, rel=1e-3)
    assert pd.read_csv(folder / "comparison.csv")["request_rate"].tolist() == [rate, rate]
    assert [options["request_rate"] for options in record["variants"].values()] == [rate, rate]
    assert "--load=0.5" in record["command"]
    assert "request_rate" not in record["command"]
    assert len(list((folder / "runs").glob("*/run.yaml"))) == 3


# -- what an interrupted one leaves


def start_endless(tmp_path: Path, model: Path, *modes: str) -> "tuple[subprocess.Popen[str], list[int]]":
    """A comparison whose runs wait for a request that comes in an hour, and the processes of the first of them."""
    workload = write_workload(tmp_path / "endless.json", [[5], [6]], 4, arrival_s=[0, 3600])
    process = subprocess.Popen(
        [*COMMAND, "compare", "--modes", ",".join(modes), "--model", model, "--workload", workload, "--ignore_eos",
         "--results", tmp_path / "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: answered(tmp_path) == [1] or process.poll() is not None, "answer to the first request")
    assert process.poll() is None
    (run,) = [each for each in processes_naming(tmp_path / "out") if each != process.pid and os.getsid(each) == each]
    return process, session_of(run)


def answered(tmp_path: Path) -> Sequence[int]:
    return [len(path.read_text().splitlines()) - 1 for path in tmp_path.glob("out/*/runs/*/latency.csv")]


def alive(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and "Z" not in state_of(pid)]


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_ctrl_c_ends_the_run_and_keeps_what_is_there(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    process, pids = start_endless(tmp_path, tiny("opt"), "sequential", "generate")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert alive(pids) == []
    folder = only_run(tmp_path / "out")
    assert yaml.safe_load((folder / "compare.yaml").read_text())["status"] == "interrupted"
    run = only_run(folder / "runs")
    assert yaml.safe_load((run / "run.yaml").read_text())["status"] == "interrupted"
    assert len(pd.read_csv(run / "latency.csv")) == 1


def test_a_killed_comparison_leaves_no_process(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    process, pids = start_endless(tmp_path, tiny("opt"), "mp", "sequential")
    assert len(pids) >= 3
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not alive(pids), "end of the run")
    run = only_run(only_run(tmp_path / "out") / "runs")
    assert yaml.safe_load((run / "run.yaml").read_text())["status"] == "interrupted"
