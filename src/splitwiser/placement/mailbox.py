"""Message transport between threads and processes.

The parent and each worker have an inbox. Other threads put messages into it directly; messages of other processes come
through pipes, which a thread of the receiver reads.
"""

import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Protocol, TypeAlias

from splitwiser.engine.messages import PARENT, Failed, Message, Stop, Wake
from splitwiser.errors import WorkerLostError

CHECK_S = 0.25  # how often the parent checks its workers

if TYPE_CHECKING:
    # messages are pickled; only processes of the same run hold the ends
    Pipe: TypeAlias = Connection[Message, Message]
else:
    Pipe = Connection  # not generic at run time


class Inbox:
    """Queue of messages for one receiver, in order of arrival."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._came = threading.Condition()

    def send(self, message: Message) -> None:
        """Put a message in."""
        with self._came:
            self._messages.append(message)
            self._came.notify()

    def drain(self) -> list[Message]:
        """Remove and return all messages, in order of arrival, without waiting."""
        with self._came:
            messages = list(self._messages)
            self._messages.clear()
        return messages

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until there is a message or the inbox is notified, at most ``timeout_s`` seconds."""
        with self._came:
            if not self._messages:
                self._came.wait(timeout_s)


class PipeInbox(Inbox):
    """An inbox that collects the messages from ``connections``, which are by sender.

    A thread reads them, so that no sender has to wait for a receiver that is in the middle of a step: a pipe holds
    64 KiB, and two processes that wait for each other's pipe to drain would deadlock. ``on_closed`` is called in that
    thread with the name of a sender whose end has closed, at the latest when its process dies.
    """

    def __init__(self, connections: Mapping[str, Pipe], on_closed: Callable[[str], None]) -> None:
        super().__init__()
        self._names = {connection: name for name, connection in connections.items()}
        self._on_closed = on_closed
        threading.Thread(target=self._read, name="mailbox", daemon=True).start()

    def wait_until_closed(self, sender: str, timeout_s: float) -> None:
        """Wait until everything that ``sender``, which has ended, had sent is received, at most ``timeout_s`` seconds."""
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


class Outbox(Protocol):
    """Destination of messages: an inbox, or a pipe to another process."""

    def send(self, message: Message, /) -> None:
        """Put a message in."""
        ...


def open_pipes(
    names: Sequence[str],
) -> tuple[dict[str, dict[str, Pipe]], dict[str, dict[str, Pipe]], dict[str, tuple[Pipe, Pipe]]]:
    """Open a pipe for every ordered pair of processes.

    Returns the receiving and the sending ends of each worker, by the name of the other process, and the parent's two
    ends (to and from the worker) by worker.
    """
    receive_ends: dict[str, dict[str, Pipe]] = {name: {} for name in names}
    send_ends: dict[str, dict[str, Pipe]] = {name: {} for name in names}
    parent_ends = {}
    for name in names:
        receive_ends[name][PARENT], to_worker = multiprocessing.Pipe(duplex=False)
        from_worker, send_ends[name][PARENT] = multiprocessing.Pipe(duplex=False)
        parent_ends[name] = to_worker, from_worker
        for other in names:
            if other != name:
                receive_ends[other][name], send_ends[name][other] = multiprocessing.Pipe(duplex=False)
    return receive_ends, send_ends, parent_ends


class MailTransport:
    """A worker's :class:`~splitwiser.engine.worker.WaitableTransport`: its own inbox, and the outboxes to the others by
    name."""

    def __init__(self, inbox: Inbox, outboxes: Mapping[str, Outbox]) -> None:
        self._inbox = inbox
        self._outboxes = outboxes
        self._sending = threading.Lock()
        self.stopped = False

    def receive(self) -> list[Message]:
        """See :meth:`splitwiser.engine.worker.Transport.receive`; sets ``stopped`` on a stop message."""
        messages = self._inbox.drain()
        if any(isinstance(message, Stop) for message in messages):
            self.stopped = True
        return [message for message in messages if not isinstance(message, Stop)]

    def send(self, to: str, message: Message) -> None:
        """See :meth:`splitwiser.engine.worker.Transport.send`; several threads may call it."""
        try:
            with self._sending:
                self._outboxes[to].send(message)
        except OSError:
            if to == PARENT:
                raise
            # the receiver has died; the parent notices that itself and ends the run

    def wait(self) -> None:
        """See :meth:`splitwiser.engine.worker.WaitableTransport.wait`."""
        self._inbox.wait()


class MailPlacement:
    """The parent's side of workers that report to its inbox; see :class:`splitwiser.engine.engine.Placement`."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._lost: WorkerLostError | None = None

    def wake(self) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.wake`."""
        self._inbox.send(Wake())

    def poll(self, until_ns: int | None) -> Sequence[Message]:
        """See :meth:`splitwiser.engine.engine.Placement.poll`; a lost worker is noticed within about a second.

        What the workers had reported before that is returned first.
        """
        while True:
            if self._lost:
                raise self._lost
            messages = self._inbox.drain()
            lost = self._find_lost_worker()
            if lost:
                messages += self._inbox.drain()  # its last reports
            for message in messages:
                if isinstance(message, Failed):
                    lost = WorkerLostError(f"worker {message.worker} failed: {message.error}")
                    lost.add_note(message.traceback)
                else:
                    self._handle(message)
            self._lost = lost
            if messages:
                return [message for message in messages if not isinstance(message, Failed)]
            left_s = float("inf") if until_ns is None else (until_ns - time.perf_counter_ns()) / 1e9
            if left_s <= 0:
                return []
            if not self._lost:
                self._inbox.wait(min(left_s, CHECK_S))

    def _handle(self, message: Message) -> None:
        """Process what concerns the placement itself in a message."""

    def _find_lost_worker(self) -> WorkerLostError | None:
        """Return the error for a worker that was lost, or None; all its reports are then in the inbox."""
        return None
