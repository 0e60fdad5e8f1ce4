"""The decode side of a worker over steps that take a known time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers import MS

from splitwiser.decode import Decoder
from splitwiser.kv_pool import BlockAllocator, KVPool, LayerShape
from splitwiser.messages import Handoff
from splitwiser.model import load_model
from splitwiser.request import Request, SamplingParams
from splitwiser.steps import InFlight


class Timed(Decoder):
    """Its steps take 10 ms."""

    clock_ns = 0

    def run_step(self, batch: Sequence[InFlight]) -> list[int]:
        self.clock_ns += 10 * MS
        return [9] * len(batch)

    def now_ns(self) -> int:
        return self.clock_ns

    def serve(self, request: Request) -> None:
        self.submit(request)
        self.admit()
        self.receive(Handoff(request.request_id, 7, 1, 2, "prefill-0"))
        while self.step():
            continue


def test_idle_time_is_no_gap_between_tokens(tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("opt"), dtype="float32", device="cpu", load_format="auto")
    pool = KVPool([LayerShape(1, 1, 1)], 8, 4, torch.float32, torch.device("cpu"))
    gaps: list[float] = []
    decoder = Timed("decode-0", model, pool, BlockAllocator(0, 8), 4, on_itl=gaps.append)
    for number in range(2):
        decoder.serve(Request(number, (5, 6), SamplingParams(max_tokens=3, ignore_eos=True), seed=0))
        decoder.clock_ns += 5_000 * MS
    assert gaps == pytest.approx([0.010] * 2)  # one between the two steps of each
