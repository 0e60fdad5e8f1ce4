"""Messages between processes: a pipe from each process to each it talks to, emptied by a thread at the receiving end."""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, TypeAlias

from splitwiser.messages import Message

if TYPE_CHECKING:
    # messages travel pickled; only the processes of one run hold the ends
    Pipe: TypeAlias = Connection[Message, Message]
else:
    Pipe = Connection  # not generic when it runs


class Mailbox:
    """Collects what comes over ``connections`` (by the sender's name).

    A thread reads, so that no sender ever waits for a receiver that is in the middle of a step: a pipe holds 64 KiB, and
    two processes each waiting for the other's pipe to empty would wait for ever. ``on_closed`` is called in that thread
    with the name of a sender whose end has closed, which happens at the latest when its process dies.
    """

    def __init__(self, connections: Mapping[str, Pipe], on_closed: Callable[[str], None]) -> None:
        self._names = {connection: name for name, connection in connections.items()}
        self._on_closed = on_closed
        self._messages: deque[Message] = deque()
        self._came = threading.Condition()
        threading.Thread(target=self._read, name="mailbox", daemon=True).start()

    def take(self) -> list[Message]:
        """What has come since the last call, in order."""
        with self._came:
            messages = list(self._messages)
            self._messages.clear()
        return messages

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when there is something to take, a sender has closed, or after ``timeout_s``."""
        with self._came:
            if not self._messages:
                self._came.wait(timeout_s)

    def _read(self) -> None:
        while self._names:
            for ready in wait(list(self._names)):
                assert isinstance(ready, Connection)
                try:
                    message = ready.recv()
                except (EOFError, OSError):
                    self._on_closed(self._names.pop(ready))
                    with self._came:
                        self._came.notify()
                    continue
                with self._came:
                    self._messages.append(message)
                    self._came.notify()
