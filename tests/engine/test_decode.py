"""The decode side of a worker over steps that take a known time."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from splitwiser.engine.decode import Decoder
from splitwiser.engine.messages import Handoff, PrefillTask
from splitwiser.engine.ranked import Priority
from splitwiser.engine.sampling import Sampled
from splitwiser.engine.steps import Chunk, SequenceState
from splitwiser.model.kv_pool import BlockAllocator
from splitwiser.request import Adapter, FinishReason, Request, SamplingParams
from tests.support.records import MS


class Timed:
    """A stepper whose steps take 10 ms."""

    clock_ns = 0

    def prefill(self, chunks: Sequence[Chunk]) -> Sampled:
        raise AssertionError(f"a decoder prefills nothing, such as {chunks}")

    def decode(self, sequences: Sequence[SequenceState]) -> Sampled:
        self.clock_ns += 10 * MS
        return Sampled([9] * len(sequences))

    def hybrid(self, chunks: Sequence[Chunk], sequences: Sequence[SequenceState]) -> tuple[Sampled, Sampled]:
        return self.prefill(chunks), self.decode(sequences)

    def finish_reason(self, sequence: SequenceState) -> FinishReason | None:
        return "length" if sequence.drawn >= sequence.request.max_tokens else None

    def now_ns(self) -> int:
        return self.clock_ns


def serve(decoder: Decoder, request: Request) -> None:
    decoder.submit(request, 0)
    decoder.admit()
    decoder.receive(Handoff(request.request_id, 7, 1, 2, "prefill-0"))
    while decoder.step():
        continue


def test_idle_time_is_no_gap_between_tokens() -> None:
    gaps: list[float] = []
    stepper = Timed()
    decoder = Decoder("decode-0", stepper, BlockAllocator(0, 8), 4, 4, on_itl=gaps.append)
    for number in range(2):
        serve(decoder, Request(number, (5, 6), SamplingParams(max_tokens=3), seed=0))
        stepper.clock_ns += 5_000 * MS
    assert gaps == pytest.approx([0.010] * 2)  # one between the two steps of each


def test_blocks_that_requests_share_are_neither_reserved_nor_freed() -> None:
    allocator = BlockAllocator(0, 8)
    decoder = Decoder("decode-0", Timed(), allocator, 4, 4)
    adapter = Adapter("a", virtual_tokens=10, blocks=(8, 9, 10), tail_tokens=2)
    for number in range(2):
        decoder.submit(Request(number, (5,) * 3, SamplingParams(max_tokens=2), seed=0, adapter=adapter), 0)
    tasks = decoder.admit()
    assert [task.blocks for task in tasks] == [(8, 9, 0, 1), (8, 9, 2, 3)]  # 2 + 3 + 1 tokens of their own
    for task in tasks:
        decoder.receive(Handoff(task.request.request_id, 7, 1, 2, "prefill-0"))
    while decoder.step():
        continue
    assert allocator.free_count == 8


def request(number: int, prompt: int, new: int) -> Request:
    return Request(number, (5,) * prompt, SamplingParams(max_tokens=new), seed=0)


def hand_over(decoder: Decoder, tasks: list[PrefillTask]) -> list[int]:
    for task in tasks:
        decoder.receive(Handoff(task.request.request_id, 7, 1, 2, "prefill-0"))
    return [task.request.request_id for task in tasks]


def test_a_request_takes_blocks_as_it_grows() -> None:
    allocator = BlockAllocator(0, 8)
    decoder = Decoder("decode-0", Timed(), allocator, 4, 4)
    decoder.submit(request(0, 4, 12), 0)
    hand_over(decoder, decoder.admit())
    used = []
    while decoder.step():
        used.append(8 - allocator.free_count)
    assert used == [2] * 4 + [3] * 4 + [4] * 2 + [0]  # 4 tokens and those whose K and V the steps store


def test_a_batch_that_no_step_follows_changes_nothing() -> None:
    allocator = BlockAllocator(0, 8)
    decoder = Decoder("decode-0", Timed(), allocator, 4, 4)
    decoder.submit(request(0, 4, 12), 0)
    hand_over(decoder, decoder.admit())
    used = []
    while decoder.batch() and decoder.step():
        used.append(8 - allocator.free_count)
    assert used == [2] * 4 + [3] * 4 + [4] * 2 + [0]


def test_admission_leaves_a_block_for_each_request_that_is_there() -> None:
    decoder = Decoder("decode-0", Timed(), BlockAllocator(0, 6), 4, 4)
    for number in range(3):
        decoder.submit(request(number, 4, 4), 0)
    assert hand_over(decoder, decoder.admit()) == [0, 1]  # two blocks each; the third's would leave none


def test_all_blocks_can_be_reserved() -> None:
    decoder = Decoder("decode-0", Timed(), BlockAllocator(0, 6), 4, 4, reserve=True)
    for number in range(3):
        decoder.submit(request(number, 4, 9), 0)  # three blocks each
    assert hand_over(decoder, decoder.admit()) == [0, 1]
    while decoder.step():
        continue
    assert [task.token_ids for task in decoder.admit()] == [()]  # the third, which nobody preempted


def test_the_last_to_arrive_is_preempted_and_goes_on_with_its_output() -> None:
    decoder = Decoder("decode-0", Timed(), BlockAllocator(0, 6), 4, 4)
    for number in range(2):
        decoder.submit(request(number, 4, 14), 0)
    hand_over(decoder, decoder.admit())
    batches = []
    while (result := decoder.step()) and len(result.progress.tokens) == 2:
        batches.append([number for number, _ in result.progress.tokens])
    assert batches == [[0, 1]] * 8  # then they need four blocks each
    while not (tasks := decoder.admit()):
        assert decoder.step()
    (task,) = tasks
    assert (task.request.request_id, task.token_ids) == (1, (7, *[9] * 8))
    assert len(task.blocks) == 4  # for 13 tokens, and the next


def test_a_policy_says_who_is_preempted() -> None:
    decoder = Decoder("decode-0", Timed(), BlockAllocator(0, 6), 4, 4, Priority())
    for number in range(2):
        decoder.submit(replace(request(number, 4, 14), priority=-number), 0)
    hand_over(decoder, decoder.admit())
    for _ in range(9):
        result = decoder.step()
    assert result is not None
    assert [number for number, _ in result.progress.tokens] == [1]


def test_who_finds_no_block_waits_for_the_prefill_of_others_and_keeps_its_own() -> None:
    allocator = BlockAllocator(0, 7)
    decoder = Decoder("decode-0", Timed(), allocator, 4, 4)
    decoder.submit(request(0, 4, 14), 0)
    hand_over(decoder, decoder.admit())
    decoder.submit(request(1, 12, 2), 0)
    tasks = decoder.admit()  # four blocks, which its prefill is to fill
    for _ in range(8):
        assert decoder.step()
    assert decoder.step() is None
    hand_over(decoder, tasks)
    result = decoder.step()
    assert result is not None
    assert [number for number, _ in result.progress.tokens] == [0]  # which came first, and has taken the other's
    assert [task.request.request_id for task in decoder.admit()] == []
