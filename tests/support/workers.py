"""Workers of every role in one thread, their messages seen."""

from collections import deque

from splitwiser.engine.messages import PARENT, Message
from splitwiser.engine.worker import Worker

BLOCK = 4


class Wire:
    """Carries messages between workers and keeps those to the parent."""

    def __init__(self) -> None:
        self.boxes: dict[str, deque[Message]] = {PARENT: deque()}
        self.sent: list[tuple[str, Message]] = []

    def end(self, name: str) -> "End":
        self.boxes[name] = deque()
        return End(self, name)


class End:
    def __init__(self, wire: Wire, name: str) -> None:
        self.wire = wire
        self.name = name

    def receive(self) -> list[Message]:
        box = self.wire.boxes[self.name]
        messages = list(box)
        box.clear()
        return messages

    def send(self, to: str, message: Message) -> None:
        self.wire.sent.append((to, message))
        self.wire.boxes[to].append(message)


def run(*workers: Worker) -> None:
    idle = 0
    while idle <= len(workers):
        ran = [worker.step_once() for worker in workers]
        idle = 0 if any(ran) else idle + 1
