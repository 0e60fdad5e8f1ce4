"""The table, the picture and the requests of ``scripts/cpu_benchmarks.py growth``."""

from pathlib import Path

import growth
import pandas as pd
import pytest
from matplotlib.image import imread

from splitwiser.study.peers.engine import STEP_TOKENS

MADE = [  # running, context, variant, status, ms
    (1, 128, "sequential", "finished", 8.0),
    (1, 128, "openvino", "finished", 10.0),
    (4, 128, "sequential", "finished", 12.0),
    (4, 128, "openvino", "failed", None),
    (1, 512, "openvino", "finished", 11.0),
]


@pytest.fixture
def rows() -> pd.DataFrame:
    made = pd.DataFrame(MADE, columns=["running", "context", "variant", "status", growth.STEP_MS])
    return made.assign(error="exit code 1: no memory", version="1.0 (bf16)", machine_busy="False")


@pytest.mark.parametrize(("running", "context"), growth.points())
def test_every_request_of_a_point_generates_until_the_last_prompt_is_read(running: int, context: int) -> None:
    made = growth.requests(running, context, 100)
    lengths = [len(prompt) for prompt in made["prompts"]]
    assert len(lengths) == running
    assert all(prompt + new == context for prompt, new in zip(lengths, made["max_new_tokens"], strict=True))
    for number, new in enumerate(made["max_new_tokens"]):
        steps_of_later_prompts = sum(lengths[number + 1 :]) / STEP_TOKENS
        assert new - 1 - steps_of_later_prompts >= growth.STEPS


def test_points_that_a_run_failed_at_are_left_open_and_named(rows: pd.DataFrame) -> None:
    table = growth.table(rows).set_index(["context", "running"])
    assert table.loc[(128, 1), growth.RATIO] == pytest.approx(0.8)
    assert table.loc[(128, 4), "sequential tokens/s"] == pytest.approx(4000 / 12)
    assert table[growth.RATIO].isna().tolist() == [False, True, True]
    text = growth.section(rows, "abcdef", "the command", "growth.png")
    assert "| 128 | 4 | 12.0 | - | - | 333 | - |" in text
    assert "Failed: openvino at 4 x 128 tokens (exit code 1: no memory)." in text
    assert "more than 1.1 times at none of 1 points" in text


def test_the_picture_is_drawn_without_them(rows: pd.DataFrame, tmp_path: Path) -> None:
    growth.draw(rows, tmp_path / "growth.png")
    assert imread(tmp_path / "growth.png").shape[:2] == (506, 1210)
