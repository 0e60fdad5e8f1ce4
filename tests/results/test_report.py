"""The report's pages, their figures against the CSVs, what they are computed from, and what a browser makes of them."""

import html
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from splitwiser.results import schema
from splitwiser.results.answer import answer
from splitwiser.results.paired import summarise
from splitwiser.results.report import write_report
from splitwiser.results.report.activity import (
    Overlap,
    PhaseActivity,
    accumulated,
    decode_tokens,
    durations,
    in_flight,
    inter_token_gaps,
    rates,
)
from splitwiser.results.report.folders import Run, read_folder
from splitwiser.results.report.plots import MOST_BARS, shown
from splitwiser.results.schema import STATISTICS, THROUGHPUT, Column
from tests.support.assertions import assert_says, refusal
from tests.support.commands import invoke, only_run

pytestmark = pytest.mark.slow

STEPS = pd.DataFrame(
    [
        ("prefill-0", "prefill", "prefill", 0.0, 2.0, 2, 100),
        ("decode-0", "decode", "decode", 2.0, 3.0, 2, 2),
        ("prefill-0", "prefill", "prefill", 2.5, 4.5, 1, 300),
        ("decode-0", "decode", "decode", 3.0, 4.0, 2, 2),
        ("decode-0", "decode", "decode", 5.0, 6.0, 1, 1),
    ],
    columns=["worker", "role", "phase", "start_s", "end_s", "requests", "tokens"],
)
LATENCY = pd.DataFrame(
    {
        "request_id": [0, 1, 2],
        "output_tokens": [3, 3, 2],
        "arrival_s": [0.0, 0.0, 1.0],
        "prefill_start_s": [0.0, 0.0, 2.5],
        "first_token_s": [2.0, 2.0, 4.5],
        "finish_s": [4.0, 4.0, 6.0],
        "handoff_ms": [0.0, 0.0, 500.0],
        "decode_worker": ["decode-0"] * 3,
    }
)

# --- what the pages are computed from


def test_amounts_are_spread_over_their_steps() -> None:
    prefill = STEPS[STEPS.phase == "prefill"]
    came = accumulated(prefill, prefill.tokens.to_numpy(dtype=float), np.array([0.0, 1.0, 2.0, 2.25, 3.5, 9.0]))
    assert came == pytest.approx([0, 50, 100, 100, 250, 400])


def test_rates_of_durations_count_what_runs_at_once() -> None:
    assert rates(STEPS, durations(STEPS), np.array([0.0, 2.0, 2.5, 4.0, 5.0])) == pytest.approx([1, 1, 2, 0.5])


def test_overlap_of_the_phases() -> None:
    assert PhaseActivity(STEPS).overlap() == Overlap(prefill_s=4.0, decode_s=3.0, both_s=1.5, either_s=5.5)


def test_steps_of_one_phase_that_overlap_each_other_count_once() -> None:
    twice = pd.concat([STEPS, STEPS.assign(worker="other")])
    assert PhaseActivity(twice).overlap() == PhaseActivity(STEPS).overlap()


HYBRID = pd.DataFrame(
    [
        ("mixed-0", "prefill", 0.0, 2.0, 2, 100, 0),
        ("mixed-0", "hybrid", 2.0, 3.0, 3, 32, 2),
        ("mixed-0", "hybrid", 3.0, 4.0, 3, 32, 2),
        ("mixed-0", "decode", 5.0, 6.0, 1, 1, 1),
    ],
    columns=["worker", "phase", "start_s", "end_s", "requests", "tokens", "decode_tokens"],
)


def test_a_hybrid_step_is_of_both_phases() -> None:
    assert PhaseActivity(HYBRID).overlap() == Overlap(prefill_s=4.0, decode_s=3.0, both_s=2.0, either_s=5.0)
    last = LATENCY.assign(first_token_s=[2.0, 2.0, 4.0], handoff_ms=[0.0, 0.0, 1000.0], decode_worker="mixed-0")
    assert inter_token_gaps(HYBRID, last) == pytest.approx([1000, 1000, 1000, 1000, 2000])


def test_decode_tokens_of_runs_before_hybrid_steps_are_those_of_decode_steps() -> None:
    assert decode_tokens(STEPS).tolist() == [0, 2, 0, 2, 1]
    assert decode_tokens(HYBRID).tolist() == [0, 2, 2, 1]


def test_close_up_shows_the_most_overlap() -> None:
    assert PhaseActivity(STEPS).busiest_window(1.5) == (2.5, 4.0)


def test_close_up_of_phases_that_alternate_shows_both() -> None:
    alternating = STEPS.assign(start_s=[0.0, 5.0, 6.0, 7.0, 8.0], end_s=[5.0, 6.0, 7.0, 8.0, 9.0])
    assert PhaseActivity(alternating).busiest_window(2.0) == (5.0, 7.0)


def test_requests_in_flight_by_state() -> None:
    states = in_flight(LATENCY, np.array([0.0, 1.5, 2.5, 4.4, 5.0, 6.0]))
    assert {name: counts.tolist() for name, counts in states.items()} == {
        "waiting": [0, 1, 0, 0, 0, 0],
        "in prefill": [2, 2, 1, 1, 0, 0],
        "generating": [0, 0, 2, 0, 1, 0],
    }


def test_a_request_that_was_cancelled_without_a_token_waits_until_then() -> None:
    row = {"request_id": 3, "output_tokens": 0, "arrival_s": 1.0, "finish_s": 3.0, "handoff_ms": None}
    states = in_flight(pd.DataFrame([row]).reindex(columns=LATENCY.columns), np.array([0.0, 1.5, 3.5]))
    assert states["waiting"].tolist() == [0, 1, 0]
    assert states["in prefill"].tolist() == states["generating"].tolist() == [0, 0, 0]


def test_gaps_between_tokens_follow_from_the_steps() -> None:
    assert inter_token_gaps(STEPS, LATENCY) == pytest.approx([1000, 1000, 1000, 1000, 1500])


def test_gaps_are_not_told_where_a_step_is_missing() -> None:
    assert inter_token_gaps(STEPS.drop(index=3), LATENCY) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.56, "1,234.6"), (99.96, "100.0"), (12.345, "12.35"), (0.01234, "0.0123"), (7.0, "7"), (40_000, "40,000")],
)
def test_rounding(value: float, text: str) -> None:
    assert shown(value) == text


# --- folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A real run of each mode, by mode."""
    results = tmp_path_factory.mktemp("results")
    made = {}
    for mode in ("sequential", "mp"):
        assert invoke("run", "--mode", mode, "--limit", "6", "--results", results / mode).returncode == 0
        made[mode] = only_run(results / mode)
    return made


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the run of mode mp."""
    return Path(shutil.copytree(runs["mp"], tmp_path / "run"))


@pytest.fixture
def comparison(runs: dict[str, Path], tmp_path: Path) -> Path:
    """Two variants over two rounds, of which one run failed."""
    folder = tmp_path / "comparison"
    rows = []
    for (number, factor), variant in itertools.product([(1, 1.0), (2, 1.5)], runs):
        row = pd.read_csv(runs[variant] / "throughput.csv").iloc[0].to_dict()
        row["output_throughput"] *= factor
        rows.append({"round": number, "variant": variant, "status": "finished", "error": "", **row})
    rows[-1] = {"round": 2, "variant": "mp", "status": "failed", "error": "worker decode-0 <died>"}
    for path in runs.values():
        shutil.copytree(path, folder / "runs" / path.name)
    pd.DataFrame(rows).to_csv(folder / "comparison.csv", index=False)
    (folder / "compare.yaml").write_text("status: finished\nrepeats: 2\n")
    return folder


def busy_row(row: pd.DataFrame, busy: bool) -> pd.DataFrame:
    """A row of ``throughput.csv``, of a machine whose other processes did much if it was ``busy``."""
    return row.assign(cores=2.0, own_cores=0.4, others_cores=1.6 if busy else 0.01, machine_busy=busy)


def say_stand_in(run: Path) -> None:
    """Change the record of ``run`` to one of a run on a stand-in for a GPU."""
    record = yaml.safe_load((run / "run.yaml").read_text())
    record["machine"]["gpu"] = "NVIDIA H200 (stand-in)"
    (run / "run.yaml").write_text(yaml.safe_dump(record))


def make_sweep(folder: Path, **grid: list[Any]) -> Path:
    """A sweep of ``grid`` in two rounds, with figures that tell its points apart."""
    folder.mkdir()
    rows = [
        {
            "point": point, "round": number, "key": f"k{point}", **dict(zip(grid, values, strict=True)),
            "status": "finished", "output_throughput": 100.0 * point + number, "median_ttft_ms": 10.0 * point,
        }
        for number in (1, 2)
        for point, values in enumerate(itertools.product(*grid.values()), start=1)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "points.csv", index=False)
    (folder / "sweep.yaml").write_text("name: example\nrepeats: 2\n")
    return folder


@pytest.fixture
def worked(run: Path) -> Path:
    """A run of the steps and requests above, which last 6 s."""
    STEPS.to_csv(run / "steps.csv", index=False)
    times = {"ttft_ms": [2000.0, 2000.0, 3500.0], "e2el_ms": [4000.0, 4000.0, 5000.0]}
    LATENCY.assign(**times).to_csv(run / "latency.csv", index=False)
    return run


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    folder = tmp_path / "profile"
    folder.mkdir()
    rates = {
        "arithmetic_intensity": [1.5, 30.25],
        "tflops": [0.012, 0.234],
        "ms": [1.5, 20.125],
        "tokens_per_s": [10, 99.5],
    }
    pd.DataFrame({"prompts": 1, "start_tokens": 0, "prompt_tokens": [64, 512], **rates}).to_csv(folder / "prefill.csv")
    pd.DataFrame({"batch": [1, 16], "context": 128, **rates}).to_csv(folder / "decode.csv")
    ceilings = [("compute", 0.25, "TFLOP/s"), ("compute", 0.375, "TFLOP/s"), ("memory", 16.79, "GB/s")]
    pd.DataFrame(ceilings, columns=["kind", "rate", "unit"]).to_csv(folder / "ceilings.csv")
    (folder / "profile.yaml").write_text("status: finished\nmodel: {name: opt-125m, dtype: bfloat16}\n")
    return folder


@pytest.fixture
def advice(tmp_path: Path) -> Path:
    """An advice with one placement that this machine cannot run and two that were checked."""
    folder = tmp_path / "advice"
    folder.mkdir()
    record = {"split": True, "recommended": {"mode": "mp", "prefill_tokens": 512}, "reasons": ["it is fast", "indeed"]}
    (folder / "advice.yaml").write_text(yaml.safe_dump(record))
    (folder / "predictions.csv").write_text(
        "mode,workers,prefill_tokens,output_throughput,not_possible\n"
        "mp,,512,123.456,\nsequential,,512,99.0,\nmps,,,,needs a GPU\n"
    )
    (folder / "checks.csv").write_text(
        "mode,workers,prefill_tokens,round,figure,predicted,measured,error\n"
        "mp,,512,0,output_throughput,123.456,100.0,0.23456\n"
        "mp,,512,1,output_throughput,123.456,120.0,0.0288\n"
        "sequential,,512,0,output_throughput,99.0,198.0,-0.5\n"
    )
    return folder


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: shutil.rmtree(run), ["run: no such folder"]),
        (lambda run: (run / "run.yaml").unlink(), ["run: not a folder of results: it contains none of run.yaml"]),
        (lambda run: (run / "run.yaml").write_text("a: ["), ["run.yaml: cannot be read as YAML"]),
        (lambda run: (run / "run.yaml").write_text("text"), ["run.yaml: must map names to values"]),
        (lambda run: (run / "steps.csv").unlink(), ["steps.csv: no such file"]),
        (lambda run: (run / "steps.csv").write_text(""), ["steps.csv: cannot be read as CSV"]),
        (lambda run: (run / "steps.csv").write_bytes(b"\xff\n"), ["steps.csv: cannot be read as CSV", "utf-8"]),
        (
            lambda run: (run / "steps.csv").write_text("worker\n1\n"),
            ["steps.csv: has no column 'phase'", "needed: worker, phase"],
        ),
        (
            lambda run: (run / "steps.csv").write_text("worker,phase,start_s,end_s,requests,tokens\na,decode,0,x,1,1\n"),
            ["steps.csv: row 1 has 'x' as end_s; a number is needed"],
        ),
    ],
)  # fmt: skip
def test_refuses_a_folder_it_cannot_understand(spoil: Callable[[Path], object], said: list[str], run: Path) -> None:
    spoil(run)
    assert_says(refusal(write_report, [run]), *said)


def test_names_a_run_inside_a_folder_that_is_none(run: Path) -> None:
    assert_says(refusal(write_report, [run.parent]), f"did you mean a folder in it, such as {run}?")


def test_refuses_an_output_that_cannot_be_written(run: Path) -> None:
    assert_says(refusal(write_report, [run], run / "none" / "page.html"), "page.html: cannot be written")


def test_refuses_a_stand_in_beside_another_device(run: Path, runs: dict[str, Path]) -> None:
    say_stand_in(run)
    assert_says(refusal(write_report, [run, runs["sequential"]]), "used a stand-in for a GPU", "separately")


def test_refuses_a_comparison_of_a_stand_in_with_another_device(comparison: Path) -> None:
    rows = pd.read_csv(comparison / "comparison.csv")
    rows.loc[rows.variant == "mp", "device"] = "cuda:0 (stand-in)"
    rows.to_csv(comparison / "comparison.csv", index=False)
    assert_says(refusal(write_report, [comparison]), "some of these runs used a stand-in for a GPU")


@pytest.mark.parametrize("cut", [1, 7])
def test_a_row_cut_short_by_a_kill_is_left_out(cut: int, run: Path) -> None:
    before = read_folder(run)
    for name in ("steps.csv", "latency.csv", "generations.csv"):
        path = run / name
        path.write_bytes(path.read_bytes()[:-cut])
    after = read_folder(run)
    assert isinstance(before, Run)
    assert isinstance(after, Run)
    for name in ("steps", "latency", "generations"):
        pd.testing.assert_frame_equal(getattr(after, name), getattr(before, name).iloc[:-1])


# --- pages


class Page(HTMLParser):
    """What a document shows: tables by id (rows of texts, headings first), texts, the answer of each part, and of pictures
    the descriptions, the texts in them and what their marks say when pointed at."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.alternatives: list[str] = []
        self.labels: list[str] = []
        self.tips: list[str] = []
        self.answers: list[str] = []
        self._texts: list[str] = []
        self._open: list[str] = []
        self._table: list[list[str]] = []
        self._in_answer = False
        self.feed(dom)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self._open.append(tag)
        if tag == "table":
            self._table = self.tables[given["id"]] = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
        elif given.get("role") == "img":
            self.alternatives.append(given["aria-label"])
        self._in_answer = given.get("class") == "answer"

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-6:]
        if "script" in inside or "style" in inside:
            return
        if "svg" in self._open and inside[-1] == "title":
            self.tips.append(data)
        elif "svg" in self._open:
            self.labels.append(data)
        elif "td" in inside or "th" in inside:
            self._table[-1][-1] += data
        if self._in_answer and inside[-1:] == ["p"]:
            self.answers.append(data)
        self._texts.append(data)

    def frame(self, name: str) -> pd.DataFrame:
        headings, *rows = self.tables[name]
        return pd.DataFrame(rows, columns=headings)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """A headless browser: the document that it makes of a file, after its scripts have run."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is on PATH")
    profile = tmp_path_factory.mktemp("browser")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1366,900"]

    def dump(path: Path) -> str:
        command = [program, *options, "--dump-dom", path.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    return dump


@pytest.fixture
def show(tmp_path: Path) -> Callable[..., Page]:
    """Report on folders and read the page as it is in the file."""
    return lambda *folders: Page(write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.fixture
def show_in_browser(browser: Callable[[Path], str], tmp_path: Path) -> Callable[..., Page]:
    """Report on folders and open the page in the browser; ``script`` runs after the page's own."""

    def open_page(*folders: Path, script: str = "") -> Page:
        path = write_report(folders, tmp_path / "page.html")
        path.write_text(path.read_text(encoding="utf-8") + f"<script>{script}</script>", encoding="utf-8")
        return Page(browser(path))

    return open_page


def is_rounded(shown_text: object, value: object) -> bool:
    """Whether the text is ``value``: a whole number as it is, another figure rounded at the text's last digit."""
    text = str(shown_text)
    if value is None or value != value:
        return text == "-"
    if isinstance(value, str | bool | np.bool_):
        return text == str(value)
    figure, number = text.replace(",", ""), float(value)  # type: ignore[arg-type]
    decimals = len(figure.partition(".")[2])
    return abs(float(figure) - number) <= (0 if number.is_integer() else 0.5001 * 10**-decimals)


def assert_shows(found: pd.DataFrame, expected: pd.DataFrame, columns: Sequence[Column] = ()) -> None:
    """Whether the table has the values of ``expected``, without its empty columns, under headings in words."""
    expected = expected.dropna(axis="columns", how="all")
    known = {column.name: column for column in columns}
    assert found.columns.tolist() == [known.get(name, Column(name, "")).title_with_unit for name in expected.columns]
    assert not any("_" in heading for heading in found.columns)
    assert len(found) == len(expected)
    for place in range(len(expected.columns)):
        for text, value in zip(found.iloc[:, place], expected.iloc[:, place], strict=True):
            assert is_rounded(text, value), (expected.columns[place], text, value)


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def test_run_page_shows_the_csvs_figures(show: Callable[..., Page], run: Path) -> None:
    page = show(run)
    figures = read(run / "throughput.csv").iloc[0]
    assert_shows(page.frame("part1-requests"), read(run / "latency.csv").sort_values("request_id"), schema.LATENCY)
    whole, known = page.frame("part1-throughput"), figures.dropna()
    titles = {column.name: column.title for column in THROUGHPUT}
    assert whole["Figure"].tolist() == [titles[name] for name in known.index]
    assert all(map(is_rounded, whole["Value"], known))
    latency = page.frame("part1-latency").set_index("Latency")
    for name, metric in {"TTFT": "ttft", "TPOT": "tpot", "ITL": "itl", "E2E": "e2el", "Handoff": "handoff"}.items():
        for statistic, words in STATISTICS.items():
            assert is_rounded(latency.at[name, words], figures[f"{statistic}_{metric}_ms"]), (metric, statistic)
    for label, column, unit in (
        ("TTFT p99", "p99_ttft_ms", "ms"), ("ITL p50", "median_itl_ms", "ms"), ("Peak memory", "peak_memory_mb", "MB"),
        ("Output throughput", "output_throughput", "tokens/s"),
    ):  # fmt: skip
        found = re.search(rf"{label} ([\d.,]+) {re.escape(unit)}", page.text)
        assert found, label
        assert is_rounded(found[1], figures[column]), label


def test_run_page_says_that_the_machine_was_busy(show: Callable[..., Page], run: Path) -> None:
    for busy in (True, False):
        busy_row(read(run / "throughput.csv"), busy).to_csv(run / "throughput.csv", index=False)
        said = "The machine was busy: other processes used 1.6 of 2 cores while this ran"
        assert (said in show(run).text) is busy


def test_run_page_shows_how_busy_workers_were(show: Callable[..., Page], run: Path) -> None:
    page = show(run)
    steps = read(run / "steps.csv")
    whole = max(steps.end_s.max(), read(run / "latency.csv").finish_s.max())
    workers = page.frame("part1-workers").set_index("Worker")
    for worker in ("prefill-0", "decode-0"):
        own = steps[steps.worker == worker]
        busy = (own.end_s - own.start_s).sum()
        assert is_rounded(workers.at[worker, "Busy, s"], busy)
        assert is_rounded(workers.at[worker, "Share of the run, %"], busy / whole * 100)
        assert is_rounded(workers.at[worker, "Tokens"], own.tokens.sum())
    times = page.frame("part1-overlap").set_index("Active")
    assert is_rounded(times.at["both", "Time, s"], PhaseActivity(steps).overlap().both_s)


def test_run_page_shows_how_long_each_phase_was_at_work(show: Callable[..., Page], worked: Path) -> None:
    page = show(worked)
    assert page.tables["part1-overlap"][1:] == [
        ["prefill", "4", "66.67"],
        ["decode", "3", "50"],
        ["both", "1.50", "25"],
        ["neither", "0.5", "8.33"],
    ]
    assert "Both phases active 25.0 % of the run" in page.text


def test_run_page_shows_every_gap_between_tokens(show: Callable[..., Page], worked: Path) -> None:
    # four of 1,000 ms and one of 1,500
    described = f"Distribution of ITL, every gap: mp median {1000:,} ms, 99th percentile {1480:,} ms"
    assert described in show(worked).alternatives


def test_run_page_shows_the_whole_record(show: Callable[..., Page], run: Path) -> None:
    record = yaml.safe_load((run / "run.yaml").read_text())
    shown_record = dict(show(run).tables["part1-record"][1:])
    assert shown_record["status"] == "finished"
    for group in ("configuration", "machine", "versions"):
        for name, value in record[group].items():
            if value in (None, ""):
                assert f"{group}.{name}" not in shown_record
            else:
                assert is_rounded(shown_record[f"{group}.{name}"], str(value) if isinstance(value, bool) else value)


def test_each_bar_of_the_timeline_says_what_its_step_did(show: Callable[..., Page], run: Path) -> None:
    steps = read(run / "steps.csv")
    tips = show(run).tips
    assert len(tips) == len(steps)
    for step in steps.itertuples():
        assert sum(
            tip.startswith(f"{step.worker} {step.phase}: {step.requests} requests, {step.tokens} tokens, ")
            for tip in tips
        )


@pytest.mark.parametrize("mode", ["sequential", "mp"])
def test_distributions_are_those_of_the_run(mode: str, show: Callable[..., Page], runs: dict[str, Path]) -> None:
    figures = read(runs[mode] / "throughput.csv").iloc[0]
    described = " ".join(show(runs[mode]).alternatives)
    for title, metric in (("TTFT by request", "ttft"), ("ITL, every gap", "itl"), ("E2E by request", "e2el")):
        found = re.search(
            rf"Distribution of {title}: {mode} median ([\d.,]+) ms, 99th percentile ([\d.,]+) ms", described
        )
        assert found, title
        assert is_rounded(found[1], figures[f"median_{metric}_ms"])
        assert is_rounded(found[2], figures[f"p99_{metric}_ms"])


def test_a_browser_shows_what_is_in_the_file(
    show: Callable[..., Page], show_in_browser: Callable[..., Page], run: Path
) -> None:
    in_file, in_browser = show(run), show_in_browser(run)
    for what in ("tables", "alternatives", "labels", "tips"):
        assert getattr(in_browser, what) == getattr(in_file, what)


def test_texts_of_a_model_are_shown_and_never_run(show_in_browser: Callable[..., Page], run: Path) -> None:
    hostile = "</dd><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & 5 < 6"
    table = read(run / "generations.csv").sort_values("request_id")
    table["summary_gen"] = hostile
    table.to_csv(run / "generations.csv", index=False)
    named = run.rename(run.parent / "<b>bold<b>")
    page = show_in_browser(named)
    assert hostile in page.text
    assert page.text.startswith(
        "<b>bold<b> <b>bold<b>"
    )  # the title, which no text of the model has changed, and the heading


@pytest.fixture
def every_kind(run: Path, comparison: Path, profile: Path, advice: Path, tmp_path: Path) -> dict[str, Path]:
    """A folder of each kind."""
    sweep = make_sweep(tmp_path / "sweep", mode=["sequential", "mp"], max_batch=[4, 8])
    return {"run": run, "comparison": comparison, "profile": profile, "advice": advice, "sweep": sweep}


@pytest.mark.parametrize("kind", ["run", "comparison", "profile", "advice", "sweep"])
def test_a_page_has_the_answer_then_pictures_then_full_tables_then_the_record(
    kind: str, every_kind: dict[str, Path], tmp_path: Path
) -> None:
    text = write_report([every_kind[kind]], tmp_path / "page.html").read_text(encoding="utf-8")
    places = [
        text.index('class="answer"'), text.index("<svg"), text.index("<table"), text.index('<table id="part1-record"')
    ]  # fmt: skip
    assert places == sorted(places)
    assert "<details" in text[places[2] : places[3]]
    for name, (headings, *rows) in Page(text).tables.items():
        assert rows, name
        assert all(any(cell not in ("-", "") for cell in row[1:]) for row in rows), name
        for heading, column in zip(headings, zip(*rows, strict=True), strict=True):
            assert any(cell not in ("-", "") for cell in column), (name, heading)


def test_findings_are_called_so_and_prompts_prompts(show: Callable[..., Page], run: Path) -> None:
    assert "Findings" in show(run).text
    record = yaml.safe_load((run / "run.yaml").read_text())
    record["configuration"]["workload"] = "prompts.json"
    (run / "run.yaml").write_text(yaml.safe_dump(record))
    text = show(run).text
    assert "Request 0 Prompt" in text
    assert "Finding" not in text


def test_page_needs_nothing_else(run: Path) -> None:
    text = write_report([run]).read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert addresses
    assert all(address.startswith("#") for address in addresses)


def test_ids_are_unique(runs: dict[str, Path], tmp_path: Path) -> None:
    text = write_report(list(runs.values()), tmp_path / "page.html").read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("width", [390, 1366])
def test_page_fits_its_width(
    width: int, browser: Callable[[Path], str], every_kind: dict[str, Path], tmp_path: Path
) -> None:
    page = (
        write_report(list(every_kind.values()), tmp_path / "page.html")
        .read_text(encoding="utf-8")
        .replace("<details>", "<details open>")
    )
    frame = f'<iframe style="border:0;width:{width}px;height:800px" srcdoc="{html.escape(page)}"></iframe>'
    measure = "document.title = frames[0].document.documentElement.scrollWidth"
    outer = tmp_path / "outer.html"
    outer.write_text(f"<title></title>{frame}<script>onload = () => {{ {measure} }}</script>", encoding="utf-8")
    found = re.search(r"<title>(\d+)</title>", browser(outer))
    assert found
    assert 300 < int(found[1]) <= width


def test_a_click_on_a_heading_sorts_by_value(show_in_browser: Callable[..., Page], run: Path) -> None:
    latency = read(run / "latency.csv")
    latency["prompt_tokens"] = lengths = sorted(latency.prompt_tokens * 10)  # some have a thousands separator, some not
    latency.to_csv(run / "latency.csv", index=False)
    assert lengths[0] < 1000 < lengths[-1]
    click = "document.querySelectorAll('#part1-requests th button')[1].click();"
    for clicks, expected in ((1, lengths), (2, lengths[::-1])):
        table = show_in_browser(run, script=click * clicks).frame("part1-requests")
        assert table["Prompt tokens"].tolist() == [f"{each:,}" for each in expected]


def test_a_killed_run_is_shown_with_its_status(show: Callable[..., Page], run: Path) -> None:
    record = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump({**record, "status": "running"}))
    (run / "throughput.csv").unlink()
    for name in ("latency.csv", "generations.csv"):
        read(run / name).head(2).to_csv(run / name, index=False)
    page = show(run)
    assert "run.yaml says 'running': it is still running or was killed." in page.text
    assert "2 requests had finished" in page.text
    assert len(page.frame("part1-requests")) == 2


def test_a_page_says_how_many_were_cancelled(show: Callable[..., Page], run: Path) -> None:
    latency = read(run / "latency.csv")
    latency.loc[0, ["prefill_start_s", "first_token_s", "queue_ms", "ttft_ms", "handoff_ms", "e2el_ms"]] = None
    latency.loc[0, "finish_reason"] = "cancelled"
    latency.to_csv(run / "latency.csv", index=False)
    read(run / "throughput.csv").assign(cancelled=1).to_csv(run / "throughput.csv", index=False)
    page = show(run)
    assert "1 requests were cancelled" in page.text
    assert len(page.frame("part1-requests")) == len(latency)


def test_the_page_of_a_stand_in_says_so(run: Path) -> None:
    say_stand_in(run)
    assert "Made on a stand-in for a GPU" in write_report([run]).read_text()


def test_a_run_killed_before_its_first_step_is_shown(show: Callable[..., Page], run: Path) -> None:
    (run / "throughput.csv").unlink()
    for name in ("steps.csv", "latency.csv", "generations.csv"):
        read(run / name).head(0).to_csv(run / name, index=False)
    assert "0 requests had finished" in show(run).text


def test_columns_are_shown_as_found(show: Callable[..., Page], run: Path) -> None:
    for name, column, value in (("latency.csv", "mood", "fine"), ("throughput.csv", "request_goodput", 4.125)):
        read(run / name).assign(**{column: value}).to_csv(run / name, index=False)
    page = show(run)
    assert set(page.frame("part1-requests")["Mood"]) == {"fine"}
    assert re.search(r"Goodput 4.12 requests/s", page.text)


def test_a_large_run_makes_a_small_page_that_says_so(run: Path) -> None:
    steps = read(run / "steps.csv")
    many = pd.concat([steps.assign(start_s=steps.start_s + shift, end_s=steps.end_s + shift) for shift in range(600)])
    assert len(many) > 5 * MOST_BARS
    many.to_csv(run / "steps.csv", index=False)
    page = write_report([run]).read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    assert f"The whole run: {len(many):,} steps. Too many steps to draw each one" in page


def test_runs_given_together_are_compared(show: Callable[..., Page], runs: dict[str, Path]) -> None:
    page = show(*runs.values())
    figures = {mode: read(path / "throughput.csv").iloc[0] for mode, path in runs.items()}
    table = page.frame("against-summary").set_index("Metric")
    assert table.columns.tolist() == ["sequential", "mp", "mp / sequential", "Verdict"]
    for label, column in (
        ("Output throughput, tokens/s", "output_throughput"),
        ("TTFT p50, ms", "median_ttft_ms"),
        ("ITL p99, ms", "p99_itl_ms"),
    ):
        first, second = (figures[mode][column] for mode in ("sequential", "mp"))
        assert is_rounded(table.at[label, "sequential"], first)
        assert is_rounded(table.at[label, "mp"], second)
        assert is_rounded(table.at[label, "mp / sequential"], second / first)
    assert page.answers[0].startswith("Undecided after one round")
    assert "Timelines of sequential, mp on a common time axis" in page.alternatives
    assert {"part1-requests", "part2-requests"} <= page.tables.keys()
    assert "differ in" not in page.text


def test_runs_of_different_questions_are_marked(show: Callable[..., Page], runs: dict[str, Path], run: Path) -> None:
    read(run / "throughput.csv").assign(dtype="bfloat16").to_csv(run / "throughput.csv", index=False)
    assert "These runs differ in number format" in show(runs["sequential"], run).text


def test_comparison_page_shows_the_csvs_figures(show: Callable[..., Page], comparison: Path) -> None:
    page = show(comparison)
    rows = read(comparison / "comparison.csv")
    assert_shows(page.frame("part1-runs"), rows, THROUGHPUT)
    assert "1 of 4 runs did not finish and are in no plot: worker decode-0 <died>." in page.text
    table = page.frame("part1-summary").set_index("Metric")
    throughput = rows[rows.variant == "sequential"].output_throughput
    assert is_rounded(table.at["Output throughput, tokens/s", "sequential"], throughput.median())
    assert str(table.at["Output throughput, tokens/s", "Verdict"]).startswith("undecided (")


def test_comparison_page_begins_with_the_sentence_of_the_terminal(show: Callable[..., Page], comparison: Path) -> None:
    rows = make_decided(comparison)
    assert show(comparison).answers[0] == answer(summarise(rows, ["sequential", "mp"]))


def make_decided(comparison: Path) -> pd.DataFrame:
    """Change the rows of ``comparison`` to two quiet rounds in which mp is twice as fast and has the same ITL."""
    rows = read(comparison / "comparison.csv").ffill().assign(status="finished", machine_busy=False, error="")
    fast = rows.variant == "mp"
    rows = rows.assign(output_throughput=np.where(fast, 200.0, 100.0), p99_itl_ms=20.0, median_ttft_ms=5.0)
    rows.to_csv(comparison / "comparison.csv", index=False)
    return rows


def test_comparison_bars_say_what_the_rounds_decide(show: Callable[..., Page], comparison: Path) -> None:
    make_decided(comparison)
    page = show(comparison)
    marked = {each.partition(" in ")[0]: each for each in page.alternatives}
    assert marked["Output throughput"].endswith("mp 200, better")
    assert marked["ITL p99"].endswith("mp 20, equal")
    assert {"better", "equal"} <= set(page.labels)


def test_comparison_page_names_the_runs_on_a_busy_machine(show: Callable[..., Page], comparison: Path) -> None:
    make_decided(comparison)
    rows = busy_row(read(comparison / "comparison.csv"), True)
    rows.assign(machine_busy=[False, True, False, False]).to_csv(comparison / "comparison.csv", index=False)
    page = show(comparison)
    assert "The machine was busy in 1 of 4 runs: variant mp in round 1; other processes used up to 1.6" in page.text
    assert "undecided" in page.labels
    assert "undecided (busy machine in 1 of 2 rounds)" in page.text


def test_sweep_page_names_the_runs_on_a_busy_machine(show: Callable[..., Page], tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", mode=["sequential", "mp"])
    points = busy_row(read(sweep / "points.csv"), True).assign(machine_busy=[True, False, False, False], round=7)
    points.to_csv(sweep / "points.csv", index=False)
    assert "The machine was busy in 1 of 4 runs: point 1 in round 7" in show(sweep).text


def test_comparison_bars_are_medians_with_their_range(show: Callable[..., Page], comparison: Path) -> None:
    described = next(each for each in show(comparison).alternatives if each.startswith("Output throughput"))
    rows = read(comparison / "comparison.csv")
    found = re.search(r"sequential ([\d.,]+) \(([\d.,]+) to ([\d.,]+)\)", described)
    assert found
    values = rows[rows.variant == "sequential"].output_throughput
    assert all(map(is_rounded, found.groups(), [values.median(), values.min(), values.max()]))


def test_comparison_page_shows_of_each_variant_the_run_nearest_to_the_median(
    show: Callable[..., Page], comparison: Path
) -> None:
    rows = []
    (whole,) = (comparison / "runs").glob("*_mp_*")
    for number, throughput in enumerate((90.0, 20.0, 10.0), start=1):
        copy = Path(shutil.copytree(whole, whole.with_name(f"run-{number}")))
        row = read(copy / "throughput.csv").assign(output_throughput=throughput, run_id=copy.name)
        row.to_csv(copy / "throughput.csv", index=False)
        rows.append({"round": number, "variant": "mp", "status": "finished", **row.iloc[0]})
    pd.DataFrame(rows).to_csv(comparison / "comparison.csv", index=False)
    text = show(comparison).text
    assert "mp: run-2" in text
    assert not re.search("mp: run-[13]", text)


def test_sweep_page_shows_the_csvs_figures(show: Callable[..., Page], tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", mode=["sequential", "mp"], max_batch=[4, 8, 16])
    page = show(sweep)
    assert_shows(page.frame("part1-points"), read(sweep / "points.csv"), THROUGHPUT)
    assert page.answers == ["6 settings: most output throughput with mode mp, max batch 16 (601.5 tokens/s)."]
    assert [each for each in page.alternatives if each.startswith("Output")] == [
        "Output throughput in tokens/s by max batch, mode"
    ]


def test_a_sweep_of_more_lines_than_fit_is_cut_into_sections(show: Callable[..., Page], tmp_path: Path) -> None:
    page = show(
        make_sweep(
            tmp_path / "sweep", mode=["mp", "green"], kernels=["a", "b", "c"], split=["x", "y"], limit=[1, 2, 3, 4]
        )
    )
    assert sum(each.startswith("Output throughput in tokens/s by limit, kernels") for each in page.alternatives) == 4
    assert "mode mp, split x" in page.text
    assert "mode green, split y" in page.text


def test_a_sweep_without_a_numeric_option_is_drawn_as_bars(show: Callable[..., Page], tmp_path: Path) -> None:
    page = show(make_sweep(tmp_path / "sweep", mode=["sequential", "mp"], lend_cores=[True, False]))
    assert "mode sequential, lend cores False" in " ".join(page.labels)


def test_points_that_their_options_do_not_tell_apart_are_told_by_their_workers(
    show: Callable[..., Page], tmp_path: Path
) -> None:
    sweep = make_sweep(tmp_path / "sweep", mode=["mp", "mps", "green"])
    points = read(sweep / "points.csv").assign(mode="mp", workers=["1 mixed", "2 mixed", "4 mixed"] * 2)
    points.to_csv(sweep / "points.csv", index=False)
    assert show(sweep).answers == ["3 settings: most output throughput with 4 mixed (301.5 tokens/s)."]


@pytest.mark.parametrize("grid", [{"max_batch": [4, 8]}, {"max_batch": [4]}])
def test_a_sweep_of_one_option_is_drawn(grid: dict[str, list[Any]], show: Callable[..., Page], tmp_path: Path) -> None:
    page = show(make_sweep(tmp_path / "sweep", **grid))
    assert sum(each.startswith("Output throughput in tokens/s") for each in page.alternatives) == 1


def test_a_sweep_of_which_nothing_has_finished_is_shown(show: Callable[..., Page], tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", mode=["sequential", "mp"])
    read(sweep / "points.csv").assign(status="failed").to_csv(sweep / "points.csv", index=False)
    page = show(sweep)
    assert page.answers == ["None of 4 runs finished."]
    assert "4 of 4 runs did not finish" in page.text


def test_runs_of_a_sweep_that_failed_are_in_no_plot(show: Callable[..., Page], tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", mode=["sequential", "mp"])
    # the second run of mp, beside one of 201 tokens/s, left a figure
    points = read(sweep / "points.csv")
    points = points.assign(status=["finished"] * 3 + ["failed"], output_throughput=[101.0, 201.0, 102.0, 999.0])
    points.to_csv(sweep / "points.csv", index=False)
    page = show(sweep)
    assert {"101.5", "201"} <= set(page.labels)
    assert "1 of 4 runs did not finish and are in no plot" in page.text


def test_ceilings_are_those_with_the_most_threads(show: Callable[..., Page], profile: Path) -> None:
    ceilings = read(profile / "ceilings.csv").assign(threads=2)
    with_one = ceilings.assign(threads=1, rate=ceilings.rate * 10)
    pd.concat([with_one, ceilings]).to_csv(profile / "ceilings.csv", index=False)
    assert "the machine reaches 0.375 TFLOP/s and 16.79 GB/s of memory" in show(profile).answers[0]


def test_profile_page_shows_the_csvs_figures(show: Callable[..., Page], profile: Path) -> None:
    page = show(profile)
    for name, columns in {"prefill": schema.PREFILL, "decode": schema.DECODE, "ceilings": schema.CEILINGS}.items():
        assert_shows(page.frame(f"part1-{name}"), read(profile / f"{name}.csv"), columns)
    assert page.answers == [
        "opt-125m in bfloat16: prefill computes up to 99.50 tokens/s, decode computes up to 99.50 tokens/s, the machine "
        "reaches 0.375 TFLOP/s and 16.79 GB/s of memory."
    ]
    assert "prefill, prompts 1, start tokens 0, prompt tokens 512: 0.234 TFLOP/s at 30.25 operations/byte" in page.tips
    assert "measured ceiling: memory 16.79 GB/s, compute 0.375 TFLOP/s" in page.labels


def test_advice_page_shows_the_recommendation(show: Callable[..., Page], advice: Path) -> None:
    page = show(advice)
    assert page.answers == ["Split the phases: mode mp, prefill tokens 512. it is fast"]
    assert "indeed" in page.text
    possible = read(advice / "predictions.csv").head(2)
    assert_shows(page.frame("part1-predictions"), possible, THROUGHPUT)
    assert page.tables["part1-not"] == [["Mode", "Not possible"], ["mps", "needs a GPU"]]


def test_advice_page_holds_predictions_against_measurements(show: Callable[..., Page], advice: Path) -> None:
    page = show(advice)
    assert page.alternatives == [
        "Output throughput in tokens/s: mode mp, prefill tokens 512 predicted 123.5, measured 110, 12% too high; "
        "mode sequential, prefill tokens 512 predicted 99, measured 198, 50% too low"
    ]
    assert {"predicted", "measured", "12% too high", "50% too low"} <= set(page.labels)
    assert page.frame("part1-checks")["Error"].tolist() == ["23% too high", "3% too high", "50% too low"]


def test_advice_page_says_why_nothing_is_recommended(show: Callable[..., Page], tmp_path: Path) -> None:
    folder = tmp_path / "advice"
    folder.mkdir()
    (folder / "advice.yaml").write_text("status: finished\nrecommended: null\ncommand: null\nreasons: [it was busy]\n")
    (folder / "predictions.csv").write_text("mode,output_throughput\nmp,5\n")
    page = show(folder)
    assert page.answers == ["Nothing is recommended. it was busy"]
    assert "Run it with" not in page.text


def test_profile_page_shows_what_was_noticed(show: Callable[..., Page], profile: Path) -> None:
    record = yaml.safe_load((profile / "profile.yaml").read_text())
    (profile / "profile.yaml").write_text(yaml.safe_dump({**record, "notes": ["other processes used 1.6 of 2 cores"]}))
    assert "Note: other processes used 1.6 of 2 cores." in show(profile).text


def test_advice_page_shows_the_profile_in_the_same_folder(show: Callable[..., Page], profile: Path) -> None:
    (profile / "advice.yaml").write_text("status: failed\nerror: no memory\n")
    (profile / "predictions.csv").write_text("mode,output_throughput\n")
    page = show(profile)
    assert "advice.yaml says 'failed' (no memory)" in page.text
    assert "The underlying profile opt-125m in bfloat16" in page.text
    assert_shows(page.frame("part1-profile-prefill"), read(profile / "prefill.csv"), schema.PREFILL)


def test_command_writes_the_page_into_the_first_folder(run: Path) -> None:
    done = invoke("report", run)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html")), done.stderr
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
