"""The parent's loop, over a placement that says what the test wants."""

from collections import deque
from collections.abc import Sequence
from typing import ClassVar

import pytest

from splitwiser.engine.engine import SplitEngine, check_fits
from splitwiser.engine.messages import Handoff, Message, Progress, StepRecord
from splitwiser.errors import RunError, WorkerLostError
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.request import Request, SamplingParams
from tests.support.assertions import assert_says, refusal
from tests.support.models import POSITIONS, make_tiny
from tests.support.observers import Seen


class Scripted:
    """Answers each poll with the next of ``answers``; an exception among them is raised."""

    pids: ClassVar[dict[str, int]] = {}

    def __init__(self, *answers: Sequence[Message] | Exception) -> None:
        self.answers = deque(answers)
        self.submitted: list[int] = []
        self.cancelled: list[int] = []
        self.woken = False

    def submit(self, request: Request, arrival_ns: int) -> None:
        self.submitted.append(request.request_id)

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)

    def wake(self) -> None:
        self.woken = True

    def poll(self, until_ns: int | None) -> Sequence[Message]:
        answer = self.answers.popleft() if self.answers else []
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        return


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(
        make_tiny("opt", tmp_path_factory.mktemp("engine") / "tiny"), dtype="float32", device="cpu", load_format="auto"
    )


def decode(token_ids: Sequence[int]) -> str:
    return f"text of {len(token_ids)} tokens"


def request(number: int, arrival_s: float = 0.0) -> Request:
    return Request(number, (5, 6), SamplingParams(max_tokens=2, ignore_eos=True), seed=0, arrival_s=arrival_s)


def answered(number: int) -> Progress:
    handoff = Handoff(number, 7, 1_000, 2_000, "prefill-0")
    return Progress("decode-0", 2_500, 3_000, (handoff,), ((number, 8),), ((number, "length"),))


def test_an_answer_is_put_together_from_handoff_and_tokens() -> None:
    (output,) = SplitEngine(decode, Scripted([answered(0)]), 100).run([request(0)], Seen(), 0)
    assert (output.token_ids, output.text, output.finish_reason) == ([7, 8], "text of 2 tokens", "length")
    metrics = output.metrics
    assert (metrics.prefill_start_ns, metrics.token_ns, metrics.decode_start_ns) == (1_000, [2_000, 3_000], 2_500)
    assert (metrics.prefill_worker, metrics.decode_worker) == ("prefill-0", "decode-0")


def test_decode_starts_with_its_first_step() -> None:
    first = Progress("decode-0", 2_500, 3_000, (Handoff(0, 7, 1_000, 2_000, "prefill-0"),), ((0, 8),), ())
    second = Progress("decode-0", 3_100, 4_000, (), ((0, 9),), ((0, "length"),))
    (output,) = SplitEngine(decode, Scripted([first], [second]), 100).run([request(0)], Seen(), 0)
    assert output.metrics.decode_start_ns == 2_500


def test_a_step_record_that_comes_after_the_last_answer_is_kept() -> None:
    late = StepRecord("prefill-0", "prefill", "prefill", 1_000, 2_000, 1, 2, 0)
    seen = Seen()
    SplitEngine(decode, Scripted([answered(0)], [late]), 100).run([request(0)], seen, 0)
    assert seen.steps == [late]


def test_a_step_record_of_the_run_before_is_dropped() -> None:
    early = StepRecord("prefill-0", "prefill", "prefill", -10, -5, 1, 2, 0)
    seen = Seen()
    SplitEngine(decode, Scripted([early], [answered(0)]), 100).run([request(0)], seen, 0)
    assert seen.steps == []


def test_requests_are_submitted_when_they_arrive() -> None:
    placement = Scripted()
    clock = [0]
    submitted: list[tuple[list[int], int | None]] = []

    def poll(until_ns: int | None) -> Sequence[Message]:
        submitted.append((list(placement.submitted), until_ns))
        clock[0] += 400_000_000
        return [answered(0), answered(1)] if len(submitted) == 4 else []

    placement.poll = poll  # type: ignore[method-assign]
    engine = SplitEngine(decode, placement, 100, lambda: clock[0])
    engine.run([request(0, arrival_s=1.0), request(1, arrival_s=0.5)], Seen(), 0)
    # looked at 0, 0.4, 0.8 and 1.2 s
    assert submitted[:4] == [([], 500_000_000), ([], 500_000_000), ([1], 1_000_000_000), ([1, 0], None)]


def test_a_closed_loop_submits_the_next_when_one_finishes() -> None:
    placement = Scripted([], [answered(1)], [answered(0)], [answered(3), answered(2)])
    engine = SplitEngine(decode, placement, 100)
    submitted = []
    poll = placement.poll

    def watching(until_ns: int | None) -> Sequence[Message]:
        submitted.append(list(placement.submitted))
        return poll(until_ns)

    placement.poll = watching  # type: ignore[method-assign]
    outputs = engine.run([request(number, arrival_s=10**6) for number in range(4)], Seen(), 77, max_concurrency=2)
    assert submitted[:4] == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    # answered() ends at 3,000 ns
    assert [output.metrics.arrival_ns for output in outputs] == [77, 77, 3_000, 3_000]


def test_requests_that_were_not_let_in_are_unanswered() -> None:
    engine = SplitEngine(decode, Scripted([answered(0)], WorkerLostError("worker decode-0 was lost")), 100)
    with pytest.raises(RunError, match=r"not answered: requests 1, 2, 3$"):
        engine.run([request(number) for number in range(4)], Seen(), 0, max_concurrency=1)


def test_a_worker_lost_after_the_last_answer_costs_none() -> None:
    engine = SplitEngine(decode, Scripted([answered(0)], WorkerLostError("worker decode-0 was lost")), 100)
    (output,) = engine.run([request(0)], Seen(), 0)
    assert output.token_ids == [7, 8]


def test_a_lost_worker_leaves_the_unanswered_by_id() -> None:
    lost = WorkerLostError("worker decode-0 was killed by SIGKILL")
    lost.add_note("where")
    engine = SplitEngine(decode, Scripted([answered(0)], lost), 100)
    with pytest.raises(RunError) as caught:
        engine.run([request(0), request(1), *(request(number, 10**6) for number in range(2, 30))], Seen(), 0)
    ids = ", ".join(map(str, range(1, 21)))
    assert str(caught.value) == f"worker decode-0 was killed by SIGKILL; not answered: requests {ids} and 9 more"
    assert caught.value.__notes__ == ["where"]


def test_a_cancel_is_passed_on_and_ends_the_request_before_the_step() -> None:
    first = Progress("decode-0", 2_500, 3_000, (Handoff(0, 7, 1_000, 2_000, "prefill-0"),), ((0, 8),), ())
    ended = Progress("decode-0", 3_100, 4_000, (), (), ((0, "cancelled"),))
    placement = Scripted([first], [ended])
    engine = SplitEngine(decode, placement, 100)

    class Cancels(Seen):
        def on_step(self, record: StepRecord) -> None:
            engine.cancel([0, 5])

    placement.answers[0] = [first, StepRecord("decode-0", "decode", "decode", 2_500, 3_000, 1, 1, 0)]
    (output,) = engine.run([request(0)], Cancels(), 0)
    assert placement.cancelled == [0]
    assert placement.woken
    assert (output.token_ids, output.finish_reason, output.metrics.cancelled_ns) == ([7, 8], "cancelled", 3_100)


def test_a_cancel_before_the_run_is_forgotten() -> None:
    placement = Scripted([answered(0)])
    engine = SplitEngine(decode, placement, 100)
    engine.cancel([0])
    (output,) = engine.run([request(0)], Seen(), 0)
    assert (output.finish_reason, placement.cancelled) == ("length", [])


# the last token that a request makes takes no position and no room


def of_tokens(prompt: int, new: int) -> Request:
    return Request(0, (5,) * prompt, SamplingParams(max_tokens=new), seed=0)


def test_a_request_may_take_every_position(model: LoadedModel) -> None:
    check_fits(of_tokens(POSITIONS - 4, 5), model, None)
    message = refusal(check_fits, of_tokens(POSITIONS - 4, 6), model, None)
    assert_says(message, f"need {POSITIONS + 1} positions", f"has {POSITIONS}")


def test_a_request_may_take_all_the_room(model: LoadedModel) -> None:
    check_fits(of_tokens(28, 5), model, 32)
    assert_says(refusal(check_fits, of_tokens(28, 6), model, 32), "room for 33 tokens", "holds 32")
