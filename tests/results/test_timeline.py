"""The trace and the picture of a run's steps."""

import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from splitwiser.engine.messages import Phase, StepRecord
from splitwiser.results.report.plots import save_timeline
from splitwiser.results.schema import STEPS, names
from splitwiser.results.timeline import PHASE_COLOURS, lanes, step_row, write_trace
from tests.support.records import START_NS, make_step

TWO = [
    make_step("prefill-0", "prefill", 5, 105, requests=3, tokens=200, role="prefill"),
    make_step("decode-0", "decode", 105, 130, requests=3, tokens=3, role="decode"),
    make_step("prefill-0", "prefill", 106, 206, requests=1, tokens=60, role="prefill"),
]


def steps_of(workers: int, count: int = 40) -> list[StepRecord]:
    """Alternating steps of ``workers`` workers that each run both phases."""
    rng = random.Random(workers)
    steps = []
    for worker in range(workers):
        now = 0
        for number in range(count):
            length = rng.randrange(5, 50)
            phase: Phase = "prefill" if number % 3 == 0 else "decode"
            steps.append(make_step(f"mixed-{worker}", phase, now, now + length, requests=rng.randrange(1, 9)))
            now += length
    return steps


def trace_of(steps: Sequence[StepRecord], directory: Path) -> list[dict[str, Any]]:
    write_trace(directory / "trace.json", steps, START_NS)
    events: list[dict[str, Any]] = json.loads((directory / "trace.json").read_text(encoding="utf-8"))
    return events


def lane_names(events: Sequence[dict[str, Any]]) -> dict[tuple[int, int], str]:
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["ph"] == "M"}


def draw(steps: Sequence[StepRecord], directory: Path, title: str) -> None:
    rows = pd.DataFrame([step_row(step, START_NS) for step in steps], columns=list(names(STEPS)))
    save_timeline(directory / "timeline.png", rows, title)


def picture_of(steps: Sequence[StepRecord], directory: Path, title: str = "a run") -> np.ndarray[Any, Any]:
    """The drawn picture, shape (height, width, 3)."""
    draw(steps, directory, title)
    with Image.open(directory / "timeline.png") as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def pixels_of(picture: np.ndarray[Any, Any], phase: Phase) -> int:
    colour = [int(PHASE_COLOURS[phase][place : place + 2], 16) for place in (1, 3, 5)]
    return int((picture == colour).all(axis=-1).sum())


def test_prefill_lanes_stand_above_decode_lanes() -> None:
    assert lanes(steps_of(2)) == [
        ("mixed-0", "prefill"), ("mixed-1", "prefill"), ("mixed-0", "decode"), ("mixed-1", "decode"),
    ]  # fmt: skip


def test_a_lane_that_ran_no_step_is_left_out() -> None:
    assert lanes(TWO) == [("prefill-0", "prefill"), ("decode-0", "decode")]


def test_trace_has_an_event_a_step_in_microseconds(tmp_path: Path) -> None:
    events = [event for event in trace_of(TWO, tmp_path) if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in events] == [
        ("prefill", 5_000, 100_000), ("decode", 105_000, 25_000), ("prefill", 106_000, 100_000),
    ]  # fmt: skip


def test_trace_says_what_each_step_took(tmp_path: Path) -> None:
    events = [event for event in trace_of(TWO, tmp_path) if event["ph"] == "X"]
    assert events[0]["args"] == {"requests": 3, "tokens": 200, "decode_tokens": 0, "role": "prefill"}


def test_trace_names_each_lane_once(tmp_path: Path) -> None:
    events = trace_of(TWO, tmp_path)
    assert sum(event["ph"] == "M" for event in events) == 2
    assert {event["name"] for event in events if event["ph"] == "M"} == {"thread_name"}
    assert sorted(lane_names(events).values()) == ["decode-0 decode", "prefill-0 prefill"]


@pytest.mark.parametrize("workers", [1, 4])
def test_trace_puts_each_step_in_its_workers_lane(workers: int, tmp_path: Path) -> None:
    steps = steps_of(workers)
    events = trace_of(steps, tmp_path)
    names = lane_names(events)
    found = [names[event["pid"], event["tid"]] for event in events if event["ph"] == "X"]
    assert found == [f"{step.worker} {step.phase}" for step in steps]


def test_trace_of_no_steps_is_an_empty_array(tmp_path: Path) -> None:
    assert trace_of([], tmp_path) == []


@pytest.mark.parametrize("workers", [1, 4])
def test_picture_is_large_enough_to_read(workers: int, tmp_path: Path) -> None:
    height, width, _ = picture_of(steps_of(workers), tmp_path).shape
    assert 1000 <= width <= 3000
    assert 300 <= height <= 3000


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_picture_shows_the_phase(phase: Phase, workers: int, tmp_path: Path) -> None:
    assert pixels_of(picture_of(steps_of(workers), tmp_path), phase) > 1000


@pytest.mark.parametrize(("phase", "absent"), [("prefill", "decode"), ("decode", "prefill")])
def test_picture_shows_no_phase_that_did_not_run(phase: Phase, absent: Phase, tmp_path: Path) -> None:
    assert pixels_of(picture_of([make_step("mixed-0", phase, 0, 100)], tmp_path), absent) == 0


def test_bar_is_as_wide_as_its_step_is_long(tmp_path: Path) -> None:
    steps = [make_step("mixed-0", "prefill", 0, 300), make_step("mixed-0", "decode", 300, 400)]
    picture = picture_of(steps, tmp_path)
    assert pixels_of(picture, "prefill") / pixels_of(picture, "decode") == pytest.approx(3, rel=0.05)


def test_more_workers_make_a_taller_picture(tmp_path: Path) -> None:
    assert picture_of(steps_of(4), tmp_path).shape[0] > picture_of(steps_of(1), tmp_path).shape[0]


@pytest.mark.parametrize(
    "steps",
    [[], [make_step("mixed-0", "prefill", 0, 100)], steps_of(4)],
    ids=["no steps", "prefill alone", "both phases"],
)
def test_drawing_warns_of_nothing(steps: list[StepRecord], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(steps, tmp_path, "a run")


@pytest.mark.parametrize("title", ["a$b_{$", "50% of 100", "größe"])
def test_any_name_of_a_folder_can_be_the_title(title: str, tmp_path: Path) -> None:
    assert (picture_of(TWO, tmp_path, title) != picture_of(TWO, tmp_path, "")).any()
