"""Trials of AMX's tiles: how times decide, and that what was decided is remembered."""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from splitwiser.model.kernels.tile_trials import (
    ALL_ROWS,
    best_seconds,
    last_row_count,
    remembered_trial,
    rows_by_dots,
)

LIBRARY = cast("ctypes.CDLL", SimpleNamespace(_name="/compiled.so"))


def test_every_candidate_runs_as_often_in_turn() -> None:
    ran: list[str] = []
    times = best_seconds({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")})
    assert set(times) == {"a", "b"}
    assert ran == ["a", "b"] * (len(ran) // 2)


@pytest.mark.parametrize(
    ("dots", "expected"), [([1, 1, 9], 2), ([9, 1, 1], 0), ([1, 9, 1], 1), ([1, 1, 1], ALL_ROWS), ([2, 2, 9], 2)]
)
def test_dot_products_are_left_the_rows_up_to_which_they_never_lost(dots: list[float], expected: int) -> None:
    times = {rows: {"dots": taken, "tiles": 2.0} for rows, taken in zip((1, 2, 4), dots, strict=True)}
    assert rows_by_dots(times) == expected


def test_the_last_count_is_the_one_before_the_first_loss() -> None:
    times = {rows: {"a": float(rows)} for rows in (8, 1, 4, 2)}
    assert last_row_count(times, lambda each: each["a"] != 4) == 2


def test_an_outcome_is_remembered_for_the_library_and_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert remembered_trial(LIBRARY, "a", lambda: [1, 2]) == [1, 2]
    assert remembered_trial(LIBRARY, "a", lambda: [3]) == [1, 2]
    assert remembered_trial(LIBRARY, "b", lambda: [3]) == [3]
    other = cast("ctypes.CDLL", SimpleNamespace(_name="/other.so"))
    assert remembered_trial(other, "a", lambda: [4]) == [4]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert remembered_trial(LIBRARY, "a", lambda: [5]) == [5]
