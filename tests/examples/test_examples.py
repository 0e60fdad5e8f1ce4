"""Each example runs, as its first lines say, and is short enough to be read at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from splitwiser import constants
from splitwiser.workload.request_entry import read_request_lines

EXAMPLES = constants.DIR_PROJECT / "examples"
MOST_LINES = 60
TWO_ROUNDS, ONE_ROUND = (f'\\"--repeats\\", \\"{rounds}\\"' for rounds in (2, 1))


def run(name: str, *arguments: str) -> str:
    # as a user starts it: the scripts set PYTHONSAFEPATH, which takes a program's own folder from where Python imports
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MOST_LINES
    assert f"python examples/{path.name}" in text


@pytest.mark.slow
def test_quickstart() -> None:
    impression, times = run("quickstart").splitlines()
    assert "edema" in impression
    assert re.fullmatch(r"\d+ tokens: the first after [\d.]+ ms, then one in [\d.]+ ms", times)


@pytest.mark.slow
def test_arrivals() -> None:
    lines = run("arrivals", "--rate", "1000", "--requests", "10").splitlines()
    assert [line.split()[0] for line in lines] == ["sequential", "mp"]
    assert all(float(figure) > 0 for line in lines for figure in re.findall(r"([\d.]+) ms", line))


@pytest.mark.slow
def test_long_prompt(tmp_path: Path) -> None:
    sizes = ["--model", "radiology-opt", "--long", "500", "--new_tokens", "300", "--after", "0.01"]
    out = tmp_path / "rows" / "long.csv"
    printed = run("long_prompt", *sizes, "--modes", "sequential", "--repeats", "2", "--out", str(out))
    rows = pd.read_csv(out)
    assert list(rows["mode"]) == ["sequential"] * 2
    assert (rows["tokens made during"] == 0).all()  # this mode prefills and decodes in turn
    assert "worst over alone" in printed


@pytest.mark.slow
def test_chat(chatty: Path) -> None:
    lines = run("chat", "--model", str(chatty), "--mode", "sequential").splitlines()
    assert sum(line.startswith("> ") for line in lines) == 3
    assert re.fullmatch(r"\d+ tokens, the first of each within \d+ ms", lines[-1])


def test_the_chats_are_read() -> None:
    requests = read_request_lines(EXAMPLES / "chats.jsonl")
    assert len(requests) == 4
    assert {each.new_tokens for each in requests} == {60}


def test_the_requests_with_adapters_name_those_of_the_embedded_model() -> None:
    requests = read_request_lines(EXAMPLES / "adapters.jsonl")
    assert {each.adapter for each in requests} == {"lora", "prefix", "none"}


@pytest.mark.slow
def test_custom_policy() -> None:
    lines = run("custom_policy").splitlines()
    (short, _), (short_first, _) = ([float(each) for each in re.findall(r"([\d.]+) ms", line)] for line in lines)
    assert short_first < short


@pytest.mark.slow
def test_custom_metric() -> None:
    pauses = [float(each) for each in re.findall(r"Longest pause: ([\d.]+) ms", run("custom_metric"))]
    assert len(pauses) == 2
    assert min(pauses) > 0


@pytest.mark.slow
def test_the_notebook(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the notebook needs the extra examples")
    nbclient = pytest.importorskip("nbclient", reason="the notebook needs the extra examples")
    text = (EXAMPLES / "compare_modes.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text.replace(TWO_ROUNDS, ONE_ROUND), as_version=4)
    assert TWO_ROUNDS in text

    nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3  # the bars, and a timeline a mode
