"""The progress bar and what it expects of requests."""

from collections.abc import Sequence

import pytest

from splitwiser.engine.engine import Observer
from splitwiser.engine.progress_bar import ProgressBar
from splitwiser.request import Request, SamplingParams
from tests.support.observers import Seen
from tests.support.records import make_output, make_step


def requests(*params: SamplingParams) -> list[Request]:
    return [Request(number, (5, 6), each, seed=0) for number, each in enumerate(params)]


def totals(asked: Sequence[Request], lengths: Sequence[int]) -> list[float | None]:
    """The tokens expected in all: at the start, and when each of the first requests has finished with its length."""
    bar = ProgressBar(Observer(), asked, "run")
    found = [bar._bar.total]
    for number, length in enumerate(lengths):
        bar.on_step(make_step("mixed-0", "decode", 0, 1, tokens=length - 1))
        bar.on_output(make_output(number, tokens=range(length)))
        found.append(bar._bar.total)
    bar.__exit__()
    return found


def test_requests_that_cannot_end_early_need_all_their_tokens() -> None:
    exact = SamplingParams(max_tokens=20, ignore_eos=True)
    assert totals(requests(exact, exact, exact), [20, 20]) == [60, 60, 60]


def test_others_are_expected_to_need_what_finished_ones_needed() -> None:
    free, long = SamplingParams(max_tokens=100), SamplingParams(max_tokens=200)
    # nothing is known; then a tenth of the maximum; then (10 + 20) of 200
    assert totals(requests(free, free, long), [10, 20]) == [None, 10 + 0.1 * 300, 30 + 0.15 * 200]


def test_a_stop_string_can_end_a_request_that_ignores_the_end_of_sequence() -> None:
    stopping = SamplingParams(max_tokens=100, ignore_eos=True, stop="x")
    assert totals(requests(stopping, stopping), [10]) == [None, 20]


def test_all_is_forwarded_and_the_last_state_stays(capsys: pytest.CaptureFixture[str]) -> None:
    seen = Seen()
    with ProgressBar(seen, requests(SamplingParams(max_tokens=100)), "sequential") as bar:
        bar.on_step(make_step("mixed-0", "prefill", 0, 1, tokens=2))
        bar.on_step(make_step("mixed-0", "decode", 1, 2, tokens=3))
        bar.on_output(make_output(0, tokens=range(4)))
    assert (len(seen.steps), len(seen.outputs)) == (2, 1)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("sequential: 100%")
    assert "1/1 requests, 4 tokens" in last


def test_a_hybrid_step_makes_its_decode_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(Seen(), requests(SamplingParams(max_tokens=100)), "sequential") as bar:
        bar.on_step(make_step("mixed-0", "hybrid", 0, 1, tokens=20, decode_tokens=3))
    assert "0/1 requests, 3 tokens" in capsys.readouterr().err
