"""The tables that the terminal shows."""

from pathlib import Path
from typing import Any

import pytest

from splitwiser.request import RequestOutput
from splitwiser.results.schema import ROUGE, throughput_figures
from splitwiser.results.terminal import columns, run_summary
from tests.support.records import START_NS, make_output

LABELS = {
    "model": "opt-125m",
    "backend": "hf",
    "mode": "mp",
    "device": "cpu",
    "dtype": "float32",
    "load_format": "auto",
}


def summary_of(outputs: list[RequestOutput], **labels: Any) -> dict[str, str]:
    """The shown lines by their first word."""
    figures = {**LABELS, **throughput_figures(outputs, 0, START_NS), **dict.fromkeys(ROUGE), **labels}
    lines = run_summary(figures, Path("/results/a run")).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(" ") for line in lines)}


def test_a_run_over_another_back_end_says_so() -> None:
    assert summary_of([], backend="vllm")["model"] == "opt-125m, float32 on cpu, mode mp over vllm"


def test_columns_start_below_each_other() -> None:
    assert columns([("a", "bb", "c"), ("long", "b", "last")]) == "a     bb  c\nlong  b   last"


def test_lines_have_no_spaces_at_their_end() -> None:
    assert columns([("a", "longer"), ("b", ""), ("", "")]) == "a  longer\nb\n"


def test_rows_of_different_lengths_are_a_mistake() -> None:
    with pytest.raises((ValueError, IndexError)):
        columns([("a", "b"), ("c",)])


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("model", "opt-125m, float32 on cpu, mode mp"),
        ("requests", "3 in 2.00 s"),
        ("tokens", "2,600 in, 6 out"),
        ("TTFT", "p50 200.0 ms, p99 592.0 ms"),
        ("ITL", "p50 100.0 ms, p99 1,766.0 ms"),
        ("E2E", "p50 600.0 ms, p99 1,972.0 ms"),
        ("throughput", "3.0 tokens/s out, 1,303.0 in and out"),
        ("results", "/results/a run"),
    ],
)
def test_line_of_a_finished_run(line: str, value: str) -> None:
    outputs = [
        make_output(tokens=(100, 200, 300), prompt_tokens=1000),
        make_output(tokens=(200, 2000), prompt_tokens=1000),
        make_output(tokens=(600,), prompt_tokens=600),
    ]
    assert summary_of(outputs)[line] == value


@pytest.mark.parametrize(("load_format", "shown"), [("dummy", True), ("auto", False)])
def test_dummy_weights_are_said(load_format: str, shown: bool) -> None:
    assert ("(dummy weights)" in summary_of([make_output()], load_format=load_format)["model"]) is shown


def test_goodput_and_quality_are_shown_where_there_are_any() -> None:
    assert not {"goodput", "quality"} & set(summary_of([make_output()]))
    shown = summary_of([make_output(tokens=(500,))], request_goodput=1.5, rouge1=0.5, rouge2=0.25, rougeL=0.4)
    assert shown["goodput"] == "1.50 of 2.00 requests/s meet every target"
    assert shown["quality"] == "ROUGE-1 0.500, ROUGE-2 0.250, ROUGE-L 0.400"


BUSY = {"machine_busy": True, "others_cores": 1.62, "cores": 2.0}


def test_a_busy_machine_is_shown_and_a_quiet_one_is_not() -> None:
    said = "busy: other processes used 1.6 of 2 cores while this ran; figures are not this machine's own"
    assert summary_of([make_output()], **BUSY)["machine"] == said
    assert "machine" not in summary_of([make_output()], **{**BUSY, "machine_busy": False})


def test_figure_of_nothing_is_a_dash() -> None:
    assert summary_of([make_output(tokens=(50,))])["ITL"] == "p50 -, p99 -"


def test_run_without_answers_can_be_shown() -> None:
    shown = summary_of([])
    assert (shown["requests"], shown["throughput"]) == ("0 in 0.00 s", "-, -")
