"""The parent's letterbox, and what it still hears of a worker that fails or is lost."""

import pytest

from splitwiser.engine.messages import Failed, Progress
from splitwiser.errors import WorkerLostError
from splitwiser.placement.mailbox import Inbox, MailPlacement, Pipe, PipeInbox
from splitwiser.placement.processes import _context

ANSWER = Progress("decode-0", 1, 2, (), ((0, 7),), ((0, "length"),))


def test_what_came_before_a_loss_is_told_first() -> None:
    inbox = Inbox()
    inbox.send(ANSWER)
    inbox.send(Failed("decode-0", "ValueError: no", "where"))
    placement = MailPlacement(inbox)
    assert placement.poll(None) == [ANSWER]
    with pytest.raises(WorkerLostError, match="worker decode-0 failed: ValueError: no"):
        placement.poll(None)


class Loses(MailPlacement):
    """Finds a worker lost, which reports ``last`` just before."""

    def __init__(self, *last: Progress | Failed) -> None:
        self._box = Inbox()
        self._last = last
        super().__init__(self._box)

    def _find_lost_worker(self) -> WorkerLostError | None:
        for message in self._last:
            self._box.send(message)
        return WorkerLostError("worker decode-0 ended with exit code 1")


def test_an_answer_that_came_as_the_worker_was_found_lost_is_heard_first() -> None:
    placement = Loses(ANSWER)
    assert placement.poll(None) == [ANSWER]
    with pytest.raises(WorkerLostError, match="worker decode-0 ended with exit code 1"):
        placement.poll(None)


def test_the_reason_that_a_worker_gave_says_more_than_that_it_ended() -> None:
    placement = Loses(Failed("decode-0", "ValueError: no", "a traceback"))
    assert placement.poll(None) == []
    with pytest.raises(WorkerLostError, match="worker decode-0 failed: ValueError: no"):
        placement.poll(None)


def test_what_lies_in_the_pipe_of_a_worker_that_has_ended_is_read_out() -> None:
    come: Pipe
    come, sends = _context.Pipe(duplex=False)
    for _ in range(500):
        sends.send(ANSWER)
    sends.close()
    mailbox = PipeInbox({"decode-0": come}, on_closed=lambda _: None)
    mailbox.wait_until_closed("decode-0", 30)
    assert mailbox.drain() == [ANSWER] * 500
