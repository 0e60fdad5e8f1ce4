"""The parent's side, over processes and pipes that note what is asked of them."""

from typing import Any

import torch

from splitwiser.engine.messages import Stop, WorkerSpec
from splitwiser.placement.mailbox import PipeInbox
from splitwiser.placement.shares import Board
from splitwiser.vllm_backend.placement import EnginePlacement


class Noting:
    """A worker's process and the pipe to it."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes, self.pid, self.exitcode = name, notes, 0, None

    def __getattr__(self, asked: str) -> Any:
        return lambda *_: self.notes.append(f"{asked} {self.name}")

    def send(self, message: object) -> None:
        assert isinstance(message, Stop)
        self.notes.append(f"stop {self.name}")


def test_an_engine_ends_once_no_other_uses_its_memory() -> None:
    notes: list[str] = []
    specs = [WorkerSpec(f"mixed-{number}", "mixed", 33) for number in range(3)]
    workers: Any = {spec.name: Noting(spec.name, notes) for spec in specs}
    board = Board.over(torch.zeros(Board.nbytes(3), dtype=torch.uint8))
    placement = EnginePlacement(specs, list(workers.values()), workers, PipeInbox({}, lambda _: None), board, None)
    placement.close()
    began, ended = ([notes.index(f"{what} mixed-{number}") for number in (2, 1, 0)] for what in ("stop", "kill"))
    assert began == sorted(began)
    assert all(end < start for end, start in zip(ended, began[1:], strict=False))
