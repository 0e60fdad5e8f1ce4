"""A worker's loop over an engine that is none: what it adds, reports and waits for."""

import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from splitwiser.engine.messages import PARENT, Cancel, Handoff, Message, Progress, StepRecord, Stop, Submit, WorkerSpec
from splitwiser.placement.mailbox import Inbox, MailTransport
from splitwiser.request import Request, SamplingParams
from splitwiser.vllm_backend.leases import Lender
from splitwiser.vllm_backend.messages import (
    BlockHandoff,
    BlockReturn,
    CancelPrefill,
    EngineOptions,
    EngineSetup,
    SharedFile,
    StartEngine,
    SubmitPrefill,
    WorkerGone,
)
from splitwiser.vllm_backend.worker import Worker

REQUEST = Request(4, (5, 6, 7), SamplingParams(max_tokens=3), seed=0)
HANDOFF = Handoff(4, 9, 10, 20, "prefill-0")
PROMPT_LOGPROBS = (((6, -1.5, 2),),)
OPTIONS = EngineOptions("m", "float32", -1, 8, 64, 1 << 20, True, 0, frozenset({2}), False, False)


class Made:
    """What an engine made of :data:`REQUEST`."""

    def __init__(
        self, token: int, is_first: bool, reason: str | None = None, lease: dict[str, Any] | None = None
    ) -> None:
        self.request, self.token, self.is_first, self.reason, self.lease = REQUEST, token, is_first, reason, lease
        self.start_ns, self.cached_tokens, self.decode_worker = 10, 128, "decode-0"
        self.logprobs, self.prompt_logprobs = ((token, -0.5, 1),), PROMPT_LOGPROBS if is_first else ()


def first(token: int) -> Handoff:
    """What a worker says of the first token of :data:`REQUEST`, if :class:`Made` is what its engine made."""
    return Handoff(4, token, 10, 20, "me", 128, ((token, -0.5, 1),), PROMPT_LOGPROBS)


class Step:
    def __init__(self, *made: Made, phase: str = "decode") -> None:
        self.phase, self.start_ns, self.end_ns, self.requests, self.tokens, self.made = phase, 10, 20, 1, 3, made
        self.decode_tokens = 0 if phase == "prefill" else 3


class ScriptedEngine:
    """Returns ``steps``, one a call; notes what was added."""

    def __init__(self, steps: Sequence[Step | None], added: list[Any]) -> None:
        self.steps = list(steps)
        self.added = added
        self.calls = 0

    @property
    def has_work(self) -> bool:
        return bool(self.steps)

    def step(self) -> Step | None:
        self.calls += 1
        return self.steps.pop(0) if self.steps else None

    def add(self, request: Request) -> None:
        self.added.append(request)

    def add_prompt(self, request: Request, decode_worker: str) -> None:
        self.added.append((request, decode_worker))

    def cancel(self, request_id: int) -> bool:
        return request_id == REQUEST.request_id and REQUEST in self.added

    def add_handoff(self, message: BlockHandoff) -> None:
        self.added.append(message)


class Exchange:
    def __init__(self) -> None:
        self.lender = Lender()


class Script(Inbox):
    """An inbox that gives ``messages`` one at a time, and then says stop; counts how often it was waited for."""

    def __init__(self, messages: Sequence[Message]) -> None:
        super().__init__()
        self.left = [*messages, Stop()]
        self.waits = 0

    def drain(self) -> list[Message]:
        return [self.left.pop(0)] if self.waits >= 0 and self.left else []

    def wait(self, timeout_s: float | None = None) -> None:
        self.waits += 1


def run(role: Any, messages: Sequence[Message], steps: Sequence[Step | None] = ()) -> dict[str, Any]:
    """Run a worker through ``messages``, and return all that can be seen of it."""
    outboxes = {name: Inbox() for name in (PARENT, "prefill-0", "decode-0")}
    inbox = Script(messages)
    added: list[Any] = []
    engine, exchange = ScriptedEngine(steps, added), Exchange()
    exchange.lender.lend("lease", [], "decode-0")
    setup = EngineSetup(WorkerSpec("me", role, 50), 0, OPTIONS, SharedFile(0, 0), None, None, 0, 1, {}, {}, {})
    Worker(setup, engine, exchange, MailTransport(inbox, outboxes)).run()  # type: ignore[arg-type]
    return {
        "sent": {name: outbox.drain() for name, outbox in outboxes.items()},
        "added": added,
        "steps": engine.calls,
        "waits": inbox.waits,
        "lender": exchange.lender,
    }


def test_a_whole_engine_reports_first_tokens_next_ones_and_ends() -> None:
    seen = run("mixed", [Submit(REQUEST, 0)], [Step(Made(7, True), phase="prefill"), Step(Made(8, False, "length"))])
    assert seen["added"] == [REQUEST]
    assert seen["sent"][PARENT] == [
        StepRecord("me", "mixed", "prefill", 10, 20, 1, 3, 0),
        Progress("me", 10, 20, (first(7),), (), ()),
        StepRecord("me", "mixed", "decode", 10, 20, 1, 3, 3),
        Progress("me", 10, 20, (), ((4, 8),), ((4, "length"),), ((4, ((8, -0.5, 1),)),)),
    ]


def test_a_prompt_goes_to_decode_with_its_first_token_and_its_blocks() -> None:
    made = Made(7, True, "length", {"lease": "x", "blocks": (3, 4), "kept": 1})
    seen = run("prefill", [SubmitPrefill(REQUEST, 0, "decode-0")], [Step(made, phase="prefill")])
    assert seen["added"] == [(REQUEST, "decode-0")]
    assert seen["sent"]["decode-0"] == [BlockHandoff(REQUEST, first(7), "x", (3, 4), 1)]
    assert [type(message) for message in seen["sent"][PARENT]] == [StepRecord]  # decode reports the token


def test_a_prompt_whose_first_token_is_the_last_is_reported_by_prefill() -> None:
    seen = run("prefill", [SubmitPrefill(REQUEST, 0, "decode-0")], [Step(Made(2, True, "stop"), phase="prefill")])
    assert seen["sent"]["decode-0"] == []
    assert seen["sent"][PARENT][-1] == Progress("me", 10, 20, (first(2),), (), ((4, "stop"),))


def test_decode_reports_a_handoff_when_it_comes_though_it_may_have_to_wait_for_blocks() -> None:
    message = BlockHandoff(REQUEST, HANDOFF, "x", (3,), 0)
    seen = run("decode", [message])
    assert seen["added"] == [message]
    assert seen["sent"][PARENT] == [Progress("me", 0, 20, (HANDOFF,), (), ())]


@pytest.mark.parametrize("message", [BlockReturn("lease", ()), WorkerGone("decode-0")])
def test_a_lease_that_ends_makes_prefill_step_so_that_its_blocks_are_free(message: Message) -> None:
    seen = run("prefill", [message])
    assert seen["steps"] == 1
    assert seen["lender"].take_ended() == {"lease"}


def test_a_cancelled_request_is_reported_where_it_is() -> None:
    seen = run("mixed", [Submit(REQUEST, 0), Cancel(4), Cancel(5)])
    (report,) = seen["sent"][PARENT]
    assert (report.tokens, report.finished) == ((), ((4, "cancelled"),))


def test_a_cancel_follows_a_request_that_was_handed_over() -> None:
    seen = run("prefill", [CancelPrefill(4, "decode-0")])
    assert seen["sent"] == {PARENT: [], "prefill-0": [], "decode-0": [Cancel(4)]}


def test_a_worker_without_room_waits_instead_of_stepping_on() -> None:
    seen = run("prefill", [SubmitPrefill(REQUEST, 0, "decode-0")], [None, None, None])
    assert (seen["steps"], seen["waits"]) == (2, 1)  # and once more after what it waited for


def test_a_message_for_another_role_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"me \(mixed\) cannot handle StartEngine"):
        run("mixed", [StartEngine()])


def test_messages_travel_whole() -> None:
    for message in (
        BlockHandoff(REQUEST, HANDOFF, "x", (3,), 0),
        BlockReturn("x", (1, 2)),
        SubmitPrefill(REQUEST, 1, "d"),
    ):
        assert pickle.loads(pickle.dumps(message)) == message


def test_a_worker_imports_neither_pytorch_nor_transformers_before_its_cores_are_chosen() -> None:
    program = (
        "import sys; import splitwiser.vllm_backend.worker; print({'torch', 'transformers', 'vllm'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
