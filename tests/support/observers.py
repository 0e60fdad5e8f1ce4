"""Observers of an engine."""

import random
import time
from collections.abc import Callable

from splitwiser import LLM
from splitwiser.engine.engine import Observer
from splitwiser.engine.messages import StepRecord
from splitwiser.request import RequestOutput


class Seen(Observer):
    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.outputs: list[RequestOutput] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_output(self, output: RequestOutput) -> None:
        self.outputs.append(output)


class Trigger(Observer):
    """Does something once, at the first step of a phase."""

    def __init__(self, phase: str, action: Callable[[], object]) -> None:
        self.phase = phase
        self.action = action
        self.at_s = 0.0

    def on_step(self, record: StepRecord) -> None:
        if record.phase == self.phase and not self.at_s:
            self.at_s = time.monotonic()
            self.action()


class Canceller(Seen):
    """Cancels requests at random, after some steps each."""

    def __init__(self, llm: LLM, requests: int, seed: int) -> None:
        super().__init__()
        self.llm = llm
        self.random = random.Random(seed)
        self.requests = requests

    def on_step(self, record: StepRecord) -> None:
        super().on_step(record)
        if self.random.random() < 0.3:
            self.llm.cancel(self.random.randrange(-1, self.requests + 1))  # some twice, and some that there are not
