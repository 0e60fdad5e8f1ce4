"""The parent's letterbox, and what it makes of a worker that fails."""

import pytest

from splitwiser.errors import WorkerLostError
from splitwiser.mailbox import Letterbox, MailPlacement
from splitwiser.messages import Failed, Progress


def test_what_came_before_a_loss_is_told_first() -> None:
    inbox = Letterbox()
    progress = Progress("decode-0", 1, 2, (), ((0, 7),), ((0, "length"),))
    inbox.send(progress)
    inbox.send(Failed("decode-0", "ValueError: no", "where"))
    placement = MailPlacement(inbox)
    assert placement.poll(None) == [progress]
    with pytest.raises(WorkerLostError, match="worker decode-0 failed: ValueError: no"):
        placement.poll(None)
