"""Traces of real traffic: what they give, and the line that each wrong one gets."""

from pathlib import Path

import pytest

from splitwiser.workload.planned import PlannedRequest
from splitwiser.workload.trace import parse_slice, read_trace
from tests.support.assertions import assert_says, refusal

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROWS = [
    "2023-11-16 18:15:59.5000000,30,3",  # out of order
    "2023-11-16 18:15:50.5000000,10,1",
    "2023-11-16 18:16:00.7500000,40,4",
    "2023-11-16 18:15:52.0000005,20,2",
]


def write(directory: Path, *rows: str, header: str = HEADER, end: str = "\r\n") -> Path:
    path = directory / "trace.csv"
    path.write_text(end.join([header, *rows]), encoding="utf-8", newline="")
    return path


def arrivals(trace: list[PlannedRequest]) -> list[float]:
    return [each.arrival_s for each in trace]


def lengths(trace: list[PlannedRequest]) -> list[tuple[int, int]]:
    return [(each.prompt_tokens, each.new_tokens) for each in trace]


def test_requests_come_in_order_of_arrival_from_the_first_on(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, *ROWS))
    assert arrivals(trace) == pytest.approx([0, 1.5000005, 9, 10.25], abs=1e-9)
    assert lengths(trace) == [(10, 1), (20, 2), (30, 3), (40, 4)]
    assert {each.prompt for each in trace} == {None}


@pytest.mark.parametrize("moment", ["0", "12.5", "2023", "20231116", "1700158550", "1e3"])
def test_a_number_is_no_time(moment: str, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS[0], f"{moment},1,1")
    assert_says(
        refusal(read_trace, path), f"--trace {path}, row 2: TIMESTAMP must be a time such as", f"not '{moment}'"
    )


def test_a_slice_counts_from_its_start_and_leaves_its_end_out(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, *ROWS), 1.0, 10.25)
    assert arrivals(trace) == pytest.approx([0.5000005, 8])
    assert lengths(trace) == [(20, 2), (30, 3)]


def test_speed_divides_the_times(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, *ROWS), 1.0, speed=4)
    assert arrivals(trace) == pytest.approx([0.5000005 / 4, 2, 9.25 / 4])


def test_other_columns_order_and_time_zones_are_taken(tmp_path: Path) -> None:
    rows = ["5,2024-05-10 02:00:01.009930+02:00,x,7", "6,2024-05-10 00:00:00+00:00,y,8"]
    path = write(tmp_path, *rows, header="GeneratedTokens,TIMESTAMP,kind,ContextTokens", end="\n")
    trace = read_trace(path)
    assert arrivals(trace) == pytest.approx([0, 1.00993])
    assert lengths(trace) == [(8, 6), (7, 5)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("60:120", (60, 120)), ("60:", (60, float("inf"))), (":0.5", (0, 0.5)), (":", (0, float("inf")))],
)
def test_slices(text: str, expected: tuple[float, float]) -> None:
    assert parse_slice(text) == expected


@pytest.mark.parametrize("text", ["", "5", "9:5", "5:5", "-1:5", "a:b", "1:2:3", "nan:"])
def test_wrong_slices_are_refused(text: str) -> None:
    assert refusal(parse_slice, text).startswith(f"--trace_slice '{text}': must be START:END in seconds")


TOKENS = "must be a whole number of 1 or more, not"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("yesterday,1,1", "row 2: TIMESTAMP must be a time such as 2023-11-16 18:15:46.6805900, not 'yesterday'"),
        (",1,1", "row 2: TIMESTAMP must be a time such as 2023-11-16 18:15:46.6805900, not ''"),
        ("2023-11-16 18:15:46,0,1", f"row 2: ContextTokens {TOKENS} '0'"),
        ("2023-11-16 18:15:46,1,-4", f"row 2: GeneratedTokens {TOKENS} '-4'"),
        ("2023-11-16 18:15:46,1,2.5", f"row 2: GeneratedTokens {TOKENS} '2.5'"),
        ("2023-11-16 18:15:46,1", f"row 2: GeneratedTokens {TOKENS} "),
    ],
)
def test_a_wrong_row_is_named_with_its_column(row: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS[0], row)
    assert_says(refusal(read_trace, path), f"--trace {path}, {message}")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "2023-11-16 18:15:46,1", header="TIMESTAMP,ContextTokens")
    assert_says(refusal(read_trace, path), f"--trace {path}: no column 'GeneratedTokens'", "its columns: TIMESTAMP, C")


def test_files_without_requests_are_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert refusal(read_trace, path) == f"--trace {path}: no requests in it; at least one is needed"
    path.write_text("")
    assert_says(refusal(read_trace, path), f"--trace {path}: cannot be read as CSV: ")
    missing = tmp_path / "none.csv"
    assert refusal(read_trace, missing) == f"--trace {missing}: no such file"
    assert_says(refusal(read_trace, tmp_path), f"--trace {tmp_path}: cannot be read as CSV: ")


def test_a_slice_without_requests_says_how_long_the_trace_is(tmp_path: Path) -> None:
    path = write(tmp_path, *ROWS)
    assert refusal(read_trace, path, 2, 3) == f"--trace {path}: no requests from 2 to 3 s; it spans 0 to 10.25 s"
