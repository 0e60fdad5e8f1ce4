"""The files of a run, what a killed run leaves of them, and the table of all runs."""

import contextlib
import csv
import multiprocessing
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime, tzinfo
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from splitwiser import files
from splitwiser.errors import RunError
from splitwiser.files import CsvTable, Status, append_row, make_run_directory, replace, write_rows
from splitwiser.machine.load import Load, MachineLoad
from splitwiser.results import recorder as results
from splitwiser.results.record import ENVIRONMENT, Record, read_environment
from splitwiser.results.recorder import RunRecorder
from splitwiser.results.report import plots
from splitwiser.workload.reports import Report
from tests.support.records import MS, make_output, make_step

REPORTS = [Report("first finding", "first reference"), Report('a "second", finding'), Report("third")]
LABELS: dict[str, Any] = {
    "run_id": "a_run", "model": "opt-125m", "case_id": 0, "backend": "hf", "mode": "mp", "workers": "1 prefill, 1 decode",
    "device": "cpu", "dtype": "float32", "load_format": "dummy", "request_rate": 2.0, "burstiness": 1.0,
    "max_concurrency": None,
}  # fmt: skip
MEMORY = {"peak_memory_mb": 512.25, "load_s": 1.5, "ready_s": 2.5}
RECORD: dict[str, Any] = {"commit": "abc", "configuration": {"model": "opt-125m", "seed": 3}, "notes": ["größe"]}


def record_of(directory: Path) -> Record:
    return Record(directory / "run" / "run.yaml", RECORD)


def make(directory: Path) -> RunRecorder:
    """A recorder of a run in ``directory``/run."""
    (directory / "run").mkdir(parents=True)
    return RunRecorder(directory / "run", record_of(directory), LABELS, REPORTS)


def start(directory: Path) -> tuple[RunRecorder, int]:
    """A recorder of a run that has begun, which :meth:`RunRecorder.finish` must end, and the run's first moment."""
    recorder = make(directory)
    return recorder, recorder.begin()


def feed(recorder: RunRecorder, start_ns: int, texts: tuple[str, ...] = (" some text\n", "", "c")) -> None:
    """Two steps and, last request first, an answer for each of ``texts``."""
    recorder.on_step(make_step("p0", "prefill", 10, 60, requests=3, tokens=9, role="prefill", start_ns=start_ns))
    recorder.on_step(make_step("d0", "decode", 60, 80, requests=3, tokens=3, role="decode", start_ns=start_ns))
    for number in reversed(range(len(texts))):
        recorder.on_output(
            make_output(number, prefill=10, decode=65, tokens=(60, 80 + number), text=texts[number], start_ns=start_ns)
        )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def header(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0]


def status_of(directory: Path) -> str:
    status: str = yaml.safe_load((directory / "run" / "run.yaml").read_text(encoding="utf-8"))["status"]
    return status


# the folder


def test_folder_is_named_by_model_case_mode_and_time(tmp_path: Path) -> None:
    directory = make_run_directory(tmp_path / "deep" / "results", "opt-125m", "case1", "mp")
    assert directory.is_dir()
    assert directory.parent == tmp_path / "deep" / "results"
    assert re.fullmatch(r"opt-125m_case1_mp_\d{8}T\d{6}Z", directory.name)


class OneMoment(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "OneMoment":
        return cls(2026, 3, 4, 5, 6, 7, tzinfo=tz)


def test_runs_of_the_same_second_get_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "datetime", OneMoment)
    names = [make_run_directory(tmp_path, "m", "case0", "mp").name for _ in range(3)]
    name = "m_case0_mp_20260304T050607Z"
    assert names == [name, f"{name}-2", f"{name}-3"]


# a run's files


def test_finished_run_leaves_every_file(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    recorder.finish("finished", MEMORY)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "generations.csv", "latency.csv", "run.yaml", "steps.csv", "throughput.csv", "timeline.png", "tokens.csv",
        "trace.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        (
            "latency.csv",
            "request_id,prompt_id,sample,prompt_tokens,cached_tokens,output_tokens,preemptions,adapter,priority,arrival_s,"
            "prefill_start_s,first_token_s,finish_s,queue_ms,ttft_ms,handoff_ms,tpot_ms,itl_p50_ms,itl_p99_ms,e2el_ms,"
            "finish_reason,prefill_worker,decode_worker",
        ),
        ("steps.csv", "worker,role,phase,start_s,end_s,requests,tokens,decode_tokens"),
        ("generations.csv", "request_id,finding,summary_ref,summary_gen"),
        ("tokens.csv", "request_id,prompt_token_ids,token_ids,logprobs,prompt_logprobs"),
        (
            "throughput.csv",
            "run_id,model,case_id,backend,mode,workers,device,dtype,quantization,kv_dtype,load_format,request_rate,burstiness,max_concurrency,duration,completed,failed,cancelled,total_input_tokens,"
            "total_output_tokens,request_throughput,request_goodput,requests_in_flight,full_batch_itl_ms,output_throughput,total_token_throughput,"
            + ",".join(
                f"{statistic}_{metric}_ms"
                for metric in ("ttft", "tpot", "itl", "e2el", "handoff")
                for statistic in ("mean", "median", "std", "p90", "p99")
            )
            + ",rouge1,rouge2,rougeL,peak_memory_mb,load_s,ready_s"
            + ",load_before,cores,own_cores,others_cores,cpu_pressure,machine_busy",
        ),
    ],
)
@pytest.mark.parametrize("answered", [True, False], ids=["answered", "nothing answered"])
def test_columns_are_those_documented(name: str, columns: str, answered: bool, tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    if answered:
        feed(recorder, start_ns)
    recorder.finish("failed", MEMORY)
    assert header(tmp_path / "run" / name) == columns


def test_latency_has_a_row_a_request_as_they_ended(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    recorder.finish("finished", MEMORY)
    found = rows(tmp_path / "run" / "latency.csv")
    assert [(row["request_id"], float(row["finish_s"]), float(row["tpot_ms"])) for row in found] == [
        ("2", 0.082, 22.0), ("1", 0.081, 21.0), ("0", 0.08, 20.0),
    ]  # fmt: skip


def test_figure_between_tokens_is_empty_for_one_token(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    recorder.on_output(make_output(tokens=(60,), start_ns=start_ns))
    recorder.finish("finished", MEMORY)
    (row,) = rows(tmp_path / "run" / "latency.csv")
    assert {column for column, value in row.items() if not value} == {
        "adapter",
        "handoff_ms",
        "tpot_ms",
        "itl_p50_ms",
        "itl_p99_ms",
    }


def test_steps_count_from_the_start_of_the_run(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    recorder.finish("finished", MEMORY)
    assert rows(tmp_path / "run" / "steps.csv") == [
        {"worker": "p0", "role": "prefill", "phase": "prefill", "start_s": "0.01", "end_s": "0.06", "requests": "3",
         "tokens": "9", "decode_tokens": "0"},
        {"worker": "d0", "role": "decode", "phase": "decode", "start_s": "0.06", "end_s": "0.08", "requests": "3",
         "tokens": "3", "decode_tokens": "3"},
    ]  # fmt: skip


def test_generation_stands_beside_its_own_report(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    recorder.finish("finished", MEMORY)
    found = [tuple(row.values()) for row in rows(tmp_path / "run" / "generations.csv")]
    assert found == [
        ("2", "third", "", "c"),
        ("1", 'a "second", finding', "", ""),
        ("0", "first finding", "first reference", " some text\n"),
    ]


def test_tokens_stand_beside_their_prompt(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    recorder.on_output(make_output(1, tokens=(1, 2), prompt_tokens=4, start_ns=start_ns))
    recorder.finish("finished", MEMORY)
    assert rows(tmp_path / "run" / "tokens.csv") == [
        {
            "request_id": "1", "prompt_token_ids": "0 1 2 3", "token_ids": "9 9", "logprobs": "", "prompt_logprobs": ""
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", [" kept ", 'a, "b"', "a\nb", "a\r\nb", "a\rb", "a\tb", "größe ✓", "NA", "007", "a\u2028b"], ids=ascii
)
def test_generated_text_comes_back_as_it_was(text: str, tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns, ("first", text, "last"))
    recorder.finish("finished", MEMORY)
    table = pd.read_csv(tmp_path / "run" / "generations.csv", dtype=str, keep_default_na=False)
    assert table["summary_gen"].tolist() == ["last", text, "first"]


def test_throughput_row_is_the_one_returned(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    figures = recorder.finish("finished", MEMORY)
    (row,) = rows(tmp_path / "run" / "throughput.csv")
    assert row == {column: "" if value is None else str(value) for column, value in figures.items()}


@pytest.mark.parametrize(
    ("column", "value"),
    [("duration", 0.082), ("completed", 3), ("failed", 0), ("total_output_tokens", 6), ("mean_ttft_ms", 60.0),
     ("median_itl_ms", 21.0), ("peak_memory_mb", 512.25), ("model", "opt-125m"), ("workers", "1 prefill, 1 decode")],
)  # fmt: skip
def test_throughput_figure_of_a_worked_run(column: str, value: Any, tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    found = recorder.finish("finished", MEMORY)[column]
    assert found == (pytest.approx(value) if isinstance(value, float) else value)


def test_what_the_machine_did_is_in_the_record_and_the_row(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    before = Load(0.2, 3.25, 2.0, 0.0, 1.5, 0.75)
    recorder = RunRecorder(tmp_path / "run", record_of(tmp_path), LABELS, REPORTS, before=before)
    start_ns = recorder.begin()
    deadline = time.monotonic() + 0.6
    while time.monotonic() < deadline:
        pass
    feed(recorder, start_ns)
    figures = recorder.finish("finished", MEMORY)
    load = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["load"]
    assert load["before"] == before.record
    assert load["during"]["seconds"] >= 0.6
    assert load["during"]["own_cores"] > 0
    assert figures["load_before"] == 3.25
    assert figures["own_cores"] == load["during"]["own_cores"]
    assert figures["machine_busy"] is load["busy"]
    assert (load["note"] is not None) is bool(figures["machine_busy"])


def test_a_run_that_never_began_has_no_load_of_its_own(tmp_path: Path) -> None:
    make(tmp_path).finish("failed", MEMORY, "RunError: no")
    load = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["load"]
    assert load == MachineLoad().record


def test_goodput_is_of_the_targets_given(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    recorder = RunRecorder(tmp_path / "run", record_of(tmp_path), LABELS, REPORTS, targets={"e2el": 81})
    feed(recorder, recorder.begin())
    assert recorder.finish("finished", MEMORY)["request_goodput"] == pytest.approx(2 / 0.082)


def scored_run(directory: Path, status: Status, text: str = " first other\n") -> dict[str, Any]:
    (directory / "run").mkdir()
    recorder = RunRecorder(directory / "run", record_of(directory), LABELS, REPORTS, scored=True)
    feed(recorder, recorder.begin(), (text, "first", "reference"))
    return recorder.finish(status, MEMORY)


def test_quality_is_of_the_requests_that_have_a_reference(tmp_path: Path) -> None:
    figures = scored_run(tmp_path, "finished")  # "first other" for "first reference"
    assert {name: figures[name] for name in ("rouge1", "rouge2", "rougeL")} == {
        "rouge1": 0.5,
        "rouge2": 0,
        "rougeL": 0.5,
    }
    for path in (tmp_path / "run" / "throughput.csv", tmp_path / "runs.csv"):
        assert [float(row["rougeL"]) for row in rows(path)] == [0.5]


def test_a_run_that_did_not_finish_is_not_scored(tmp_path: Path) -> None:
    assert scored_run(tmp_path, "interrupted")["rougeL"] is None


def test_figures_are_on_disk_before_texts_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "rouge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scored_run(tmp_path, "finished")
    (row,) = rows(tmp_path / "run" / "throughput.csv")
    assert (row["completed"], row["rougeL"]) == ("3", "")


def test_requests_without_an_answer_count_as_failed(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    recorder.on_output(make_output(1, start_ns=start_ns))
    figures = recorder.finish("failed", MEMORY)
    assert (figures["completed"], figures["failed"]) == (1, 2)


def test_clock_starts_at_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = make(tmp_path)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: 123 * MS)
    moment = recorder.begin()
    recorder.finish("finished", MEMORY)
    assert moment == 123 * MS


# run.yaml


def test_record_says_running_from_the_start(tmp_path: Path) -> None:
    make(tmp_path)
    found = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert found.pop("load") == MachineLoad().record
    assert datetime.fromisoformat(found.pop("started")).tzinfo is not None
    assert found == {"status": "running", **RECORD}


@pytest.mark.parametrize("status", ["finished", "failed", "interrupted"])
def test_record_says_how_the_run_ended(status: Status, tmp_path: Path) -> None:
    start(tmp_path)[0].finish(status, MEMORY)
    found = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert found.pop("load")["during"]["seconds"] > 0
    assert found.pop("started")
    assert found == {"status": status, **RECORD}


def test_record_lists_the_unanswered_requests(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    recorder.on_output(make_output(1, start_ns=start_ns))
    recorder.finish("failed", MEMORY, "RunError: a fault")
    found = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert found["unanswered"] == [0, 2]


def test_record_keeps_the_error(tmp_path: Path) -> None:
    start(tmp_path)[0].finish("failed", MEMORY, "RunError: größe:\nsecond line")
    found = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert found["error"] == "RunError: größe:\nsecond line"


# what a killed run leaves


def test_tables_have_their_header_before_the_first_row(tmp_path: Path) -> None:
    make(tmp_path)
    for name in ("latency.csv", "steps.csv", "generations.csv", "tokens.csv"):
        assert rows(tmp_path / "run" / name) == []
        assert header(tmp_path / "run" / name)


COUNTS = {"latency.csv": 3, "steps.csv": 2, "generations.csv": 3, "tokens.csv": 3}


def counts(directory: Path) -> dict[str, int]:
    return {name: len(rows(directory / "run" / name)) for name in COUNTS}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(0.005)


def test_rows_reach_the_disk_while_nothing_more_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FLUSH_S", 0.01)
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    wait_until(lambda: counts(tmp_path) == COUNTS)
    found = counts(tmp_path)
    recorder.finish("interrupted", MEMORY)
    assert found == COUNTS


def test_rows_wait_for_the_interval_or_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FLUSH_S", 3600)
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    before = counts(tmp_path)
    recorder.finish("finished", MEMORY)
    assert (before, counts(tmp_path)) == (dict.fromkeys(COUNTS, 0), COUNTS)


def test_rows_come_in_order_however_often_they_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FLUSH_S", 1e-4)
    monkeypatch.setattr(plots, "save_timeline", lambda *_: None)
    recorder, start_ns = start(tmp_path)
    for number in range(3000):
        recorder.on_step(make_step("d0", "decode", number, number + 1, tokens=number, start_ns=start_ns))
    recorder.finish("finished", MEMORY)
    assert [int(row["tokens"]) for row in rows(tmp_path / "run" / "steps.csv")] == list(range(3000))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_rows_that_could_not_be_written_are_written_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = make(tmp_path)
    attempts = []

    def fail(*_: object, **__: object) -> None:
        attempts.append(1)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(results, "FLUSH_S", 0.01)
        patch.setattr(files, "_line", fail)
        feed(recorder, recorder.begin())
        wait_until(lambda: bool(attempts))
    recorder.finish("finished", MEMORY)
    assert counts(tmp_path) == COUNTS


def test_a_row_cut_off_by_a_full_disk_is_written_whole_later(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    with (tmp_path / "run" / "steps.csv").open("a", encoding="utf-8") as file:
        file.write('"p0","pre')  # as far as there was room
    recorder.finish("finished", MEMORY)
    assert counts(tmp_path) == COUNTS


def test_half_of_a_surrogate_pair_costs_no_row(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns, ("first", "cut \ud83d", "last"))
    recorder.finish("finished", MEMORY)
    found = [row["summary_gen"] for row in rows(tmp_path / "run" / "generations.csv")]
    assert found == ["last", r"cut \ud83d", "first"]


def fail_to_flush(_: object) -> None:
    raise ValueError("no row")


def test_a_run_whose_rows_cannot_be_written_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    monkeypatch.setattr(CsvTable, "flush", fail_to_flush)
    with pytest.raises(RunError, match=r"^rows could not be written: ValueError: no row; all other results are in "):
        recorder.finish("finished", MEMORY)
    assert status_of(tmp_path) == "failed"
    assert (tmp_path / "run" / "throughput.csv").exists()
    assert not (tmp_path / "runs.csv").exists()


def test_a_table_that_cannot_be_written_costs_no_other(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    path = tmp_path / "run" / "steps.csv"
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match="rows could not be written: IsADirectoryError"):
        recorder.finish("finished", MEMORY)
    assert {name: len(rows(tmp_path / "run" / name)) for name in COUNTS if name != path.name} == {
        name: count for name, count in COUNTS.items() if name != path.name
    }


def test_the_outcome_is_written_before_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    recorder, _ = start(tmp_path)
    monkeypatch.setattr(results, "throughput_figures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recorder.finish("interrupted", MEMORY, "KeyboardInterrupt: ")
    assert status_of(tmp_path) == "interrupted"


@pytest.mark.parametrize("begun", [True, False])
def test_no_thread_is_left(begun: bool, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    recorder = start(tmp_path)[0] if begun else make(tmp_path)
    recorder.finish("failed", MEMORY)
    assert set(threading.enumerate()) <= before


def test_a_second_at_most_passes_until_rows_are_on_disk() -> None:
    assert 0 < results.FLUSH_S <= 1


def test_a_picture_that_cannot_be_drawn_costs_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr(plots, "save_timeline", fail)
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    recorder.finish("finished", MEMORY)
    assert status_of(tmp_path) == "finished"
    assert [row["completed"] for row in rows(tmp_path / "runs.csv")] == ["3"]


# runs.csv


def test_finished_run_enters_the_table_of_runs(tmp_path: Path) -> None:
    recorder, start_ns = start(tmp_path)
    feed(recorder, start_ns)
    recorder.finish("finished", MEMORY)
    assert rows(tmp_path / "runs.csv") == rows(tmp_path / "run" / "throughput.csv")


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_other_runs_stay_out_of_the_table_of_runs(status: Status, tmp_path: Path) -> None:
    start(tmp_path)[0].finish(status, MEMORY)
    assert not (tmp_path / "runs.csv").exists()


def test_differing_columns_stay_empty_on_the_other_side(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    for row in ({"a": 1, "b": 2.5}, {"b": 3, "c": "x"}, {"a": None, "c": "y"}):
        append_row(path, row)
    assert rows(path) == [
        {"a": "1", "b": "2.5", "c": ""}, {"a": "", "b": "3", "c": "x"}, {"a": "", "b": "", "c": "y"},
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["007", "1.10", "0.1000000000000000055", "True", "1e3", "NA", "None", "a,b", 'a "b"'])
def test_later_rows_leave_a_row_as_it_was(value: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    append_row(path, {"run_id": "one", "label": value})
    append_row(path, {"run_id": "two", "label": "x"})
    assert rows(path)[0]["label"] == value


def test_a_table_that_was_emptied_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.touch()
    append_row(path, {"a": 1})
    assert rows(path) == [{"a": "1"}]


ROWS, PROCESSES = 12, 3


def append_many(path: Path, process: int, barrier: Barrier) -> None:
    barrier.wait(timeout=120)
    for number in range(ROWS):
        append_row(path, {"process": process, "number": number, f"only_{process}": "x"})


def test_processes_that_append_at_once_lose_no_row(tmp_path: Path) -> None:
    path, context = tmp_path / "runs.csv", multiprocessing.get_context("fork")
    barrier = context.Barrier(PROCESSES)
    others = [context.Process(target=append_many, args=(path, number, barrier)) for number in range(1, PROCESSES)]
    for process in others:
        process.start()
    append_many(path, 0, barrier)
    for process in others:
        process.join(timeout=60)
        process.kill()  # does nothing to one that has ended
    found = sorted((int(row["process"]), int(row["number"])) for row in rows(path))
    assert found == [(process, number) for process in range(PROCESSES) for number in range(ROWS)]


# the record


def test_a_record_says_where_it_was_made(tmp_path: Path) -> None:
    record = Record(tmp_path / "run.yaml", {"configuration": {"seed": 3}}, torch.device("cpu"))
    record.content["load"] = None
    record.write("finished")
    content = yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf-8"))
    assert list(content) == ["status", "started", "commit", "configuration", "machine", "versions", "load"]
    assert read_environment(tmp_path / "run.yaml") == {name: content[name] for name in ENVIRONMENT}


# the writer of tables


def test_a_column_that_a_table_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a\.csv has no column 'c'; its columns are a, b$"):
        CsvTable(tmp_path / "a.csv", ("a", "b")).add({"a": 1, "c": 2})
    with pytest.raises(ValueError, match=r"^b\.csv has no column 'c'; its columns are a, b$"):
        write_rows(tmp_path / "b.csv", ("a", "b"), [{"a": 1, "c": 2}])


@pytest.mark.parametrize("value", ["a,b", 'say "so"', "two\nlines", "bare\rreturn", "both\r\n", " space ", "größe", ""])
def test_any_text_is_read_as_it_was_written(value: str, tmp_path: Path) -> None:
    table = CsvTable(tmp_path / "a.csv", ("number", "text"))
    table.write({"number": 1, "text": value})
    write_rows(tmp_path / "b.csv", ("number", "text"), [{"number": 1, "text": value}])
    for path in (tmp_path / "a.csv", tmp_path / "b.csv"):
        assert rows(path) == pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
        assert rows(path) == [{"number": "1", "text": value}]


def test_nothing_is_an_empty_cell(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", ("a", "b", "c"), [{"a": None, "b": float("nan")}])
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "a,b,c\n,,\n"


# replacing a file


def test_replace_writes_the_text_and_nothing_else(tmp_path: Path) -> None:
    for text in ("old\n", "größe"):
        replace(tmp_path / "a.txt", text)
        assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("a.txt", text)]


def test_reader_of_a_replaced_file_finds_the_old_content(tmp_path: Path) -> None:
    replace(tmp_path / "a.txt", "old and long")
    with (tmp_path / "a.txt").open(encoding="utf-8") as reader:
        replace(tmp_path / "a.txt", "new")
        assert reader.read() == "old and long"


@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_failing_to_replace_keeps_the_old_content(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_replace(method, tmp_path / "a.txt", monkeypatch)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_failing_to_replace_leaves_no_partial_file(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_replace(method, tmp_path / "a.txt", monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def fail_to_replace(method: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write ``path`` once, then let ``method`` fail on the second time, as on a full disk."""
    replace(path, "old")

    def fail(partial: Path, *_: object, **__: object) -> None:
        partial.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fail)
        with pytest.raises(OSError, match="No space left"):
            replace(path, "new")


def test_a_file_that_cannot_be_written_is_named_by_what_it_was_to_be(tmp_path: Path) -> None:
    path = tmp_path / "none" / "run.yaml"
    with pytest.raises(FileNotFoundError) as caught:
        replace(path, "status: running")
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{path}'"


def test_a_picture_cut_in_the_middle_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    recorder, _ = start(tmp_path)
    monkeypatch.setattr(plots, "save_timeline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recorder.finish("interrupted", MEMORY, "KeyboardInterrupt: ")
    assert not [path.name for path in recorder.directory.iterdir() if "timeline.png" in path.name]


@pytest.mark.parametrize(
    ("raised", "status"), [(None, "finished"), (KeyboardInterrupt, "interrupted"), (RunError, "failed")]
)
def test_a_record_says_how_its_command_ended(
    raised: type[BaseException] | None, status: Status, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path / "command.yaml", {})
    with contextlib.suppress(KeyboardInterrupt, RunError), record.running():
        assert yaml.safe_load((tmp_path / "command.yaml").read_text())["status"] == "running"
        if raised is not None:
            raise raised
    assert yaml.safe_load((tmp_path / "command.yaml").read_text())["status"] == status
    said = f"{status}; the results so far are in {tmp_path}\n"
    assert capsys.readouterr().err == (said if raised else "")
