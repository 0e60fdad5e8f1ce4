"""The decode side of a worker over steps that take a known time."""

from collections.abc import Sequence

import pytest

from splitwiser.engine.decode import Decoder
from splitwiser.engine.messages import Handoff
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
