"""How messages get about: a letterbox for each worker and the parent, which other threads post into, or a thread that
empties the pipes from other processes."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Protocol, TypeAlias

from splitwiser.engine.messages import Failed, Message, Stop
from splitwiser.engine.worker import PARENT
from splitwiser.errors import WorkerLostError

LOOK_S = 0.25  # how often the parent looks after its workers

if TYPE_CHECKING:
    # messages travel pickled; only the processes of one run hold the ends
    Pipe: TypeAlias = Connection[Message, Message]
else:
    Pipe = Connection  # not generic when it runs


class Letterbox:
    """Messages for one receiver, in the order in which they came."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._came = threading.Condition()

    def send(self, message: Message) -> None:
        """Put a message in."""
        with self._came:
            self._messages.append(message)
            self._came.notify()

    def take(self) -> list[Message]:
        """What has come since the last call, in order."""
        with self._came:
            messages = list(self._messages)
            self._messages.clear()
        return messages

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when there is something to take or to look after, or after ``timeout_s``."""
        with self._came:
            if not self._messages:
                self._came.wait(timeout_s)


class Mailbox(Letterbox):
    """A letterbox that collects what comes over ``connections`` (by the sender's name).

    A thread reads, so that no sender ever waits for a receiver that is in the middle of a step: a pipe holds 64 KiB, and
    two processes each waiting for the other's pipe to empty would wait for ever. ``on_closed`` is called in that thread
    with the name of a sender whose end has closed, which happens at the latest when its process dies.
    """

    def __init__(self, connections: Mapping[str, Pipe], on_closed: Callable[[str], None]) -> None:
        super().__init__()
        self._names = {connection: name for name, connection in connections.items()}
        self._on_closed = on_closed
        threading.Thread(target=self._read, name="mailbox", daemon=True).start()

    def read_out(self, sender: str, timeout_s: float) -> None:
        """Return when all that ``sender``, which has ended, had sent is here, or after ``timeout_s``."""
        with self._came:
            self._came.wait_for(lambda: sender not in self._names.values(), timeout_s)

    def _read(self) -> None:
        while self._names:
            for ready in wait(list(self._names)):
                assert isinstance(ready, Connection)
                try:
                    message = ready.recv()
                except (EOFError, OSError):
                    with self._came:
                        sender = self._names.pop(ready)
                        self._came.notify()
                    self._on_closed(sender)
                    continue
                self.send(message)


class Sends(Protocol):
    """Where a message can be put in: a letterbox, or a pipe to another process."""

    def send(self, message: Message, /) -> None:
        """Put a message in."""
        ...


class MailTransport:
    """A worker's transport (see :class:`splitwiser.engine.worker.Transport`): its letterbox, and those of the others by
    name."""

    def __init__(self, inbox: Letterbox, outbox: Mapping[str, Sends]) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self.stopped = False

    def receive(self) -> list[Message]:
        """What has come; notes whether the worker is to stop."""
        messages = self._inbox.take()
        if any(isinstance(message, Stop) for message in messages):
            self.stopped = True
        return [message for message in messages if not isinstance(message, Stop)]

    def send(self, to: str, message: Message) -> None:
        """See :meth:`splitwiser.engine.worker.Transport.send`."""
        try:
            self._outbox[to].send(message)
        except OSError:
            if to == PARENT:
                raise
            # the receiver has died; the parent learns so by itself and ends the run

    def wait(self) -> None:
        """Return when there is something to receive."""
        self._inbox.wait()


class MailPlacement:
    """The parent's side of workers that report to its letterbox; see :class:`splitwiser.engine.engine.Placement`."""

    def __init__(self, inbox: Letterbox) -> None:
        self._inbox = inbox
        self._lost: WorkerLostError | None = None

    def poll(self, until_ns: int | None) -> Sequence[Message]:
        """See :meth:`splitwiser.engine.engine.Placement.poll`; a lost worker is noticed within a second.

        What the workers reported before one was lost is returned first.
        """
        while True:
            if self._lost:
                raise self._lost
            messages = self._inbox.take()
            lost = self._find_lost()
            if lost:
                messages += self._inbox.take()  # what it still reported
            for message in messages:
                if isinstance(message, Failed):
                    lost = WorkerLostError(f"worker {message.worker} failed: {message.error}")
                    lost.add_note(message.traceback)
                else:
                    self._note(message)
            self._lost = lost
            if messages:
                return [message for message in messages if not isinstance(message, Failed)]
            left_s = float("inf") if until_ns is None else (until_ns - time.perf_counter_ns()) / 1e9
            if left_s <= 0:
                return []
            if not self._lost:
                self._inbox.wait(min(left_s, LOOK_S))

    def _note(self, message: Message) -> None:
        """Take in what the placement itself wants of a message."""

    def _find_lost(self) -> WorkerLostError | None:
        """A worker that was lost, if there is one; all that it reported is in the letterbox then."""
        return None
