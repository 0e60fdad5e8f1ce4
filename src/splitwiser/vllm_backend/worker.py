"""A worker process of this back end: its setup and its main loop. Runs in vLLM's environment.

Nothing here may import PyTorch before the cores are chosen: what computes is imported by :func:`_run`.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from splitwiser.engine.messages import PARENT, Cancel, Failed, Handoff, Message, Progress, StepRecord, Submit
from splitwiser.errors import UnsupportedModelError
from splitwiser.placement.mailbox import MailTransport, PipeInbox
from splitwiser.vllm_backend.messages import (
    BlockHandoff,
    BlockReturn,
    CancelPrefill,
    EngineReady,
    EngineSetup,
    Refused,
    StartEngine,
    SubmitPrefill,
    WorkerGone,
)

if TYPE_CHECKING:
    from splitwiser.vllm_backend.connector import Exchange
    from splitwiser.vllm_backend.engine import Engine, Step

HEARTBEAT_S = 0.1  # how often a worker shows that it is alive


def main(pipes: Sequence[str]) -> None:
    """Main function of a worker process, with the numbers of its two ``pipes`` to the parent: that to receive from and that
    to send to."""
    receive, send = map(int, pipes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
    from_parent, to_parent = _open(receive, readable=True), _open(send, readable=False)
    setup = from_parent.recv()
    assert isinstance(setup, EngineSetup)
    name = setup.spec.name
    Path("/proc/self/comm").write_text(name, encoding="ascii")  # the name that ps and top show
    sources = {PARENT: from_parent, **{other: _open(fd, readable=True) for other, fd in setup.receive.items()}}
    targets = {PARENT: to_parent, **{other: _open(fd, readable=False) for other, fd in setup.send.items()}}

    def closed(sender: str) -> None:
        if sender == PARENT:
            os._exit(1)  # the parent has ended; stop at once, even in the middle of a step
        inbox.send(WorkerGone(sender))

    inbox = PipeInbox(sources, closed)
    transport = MailTransport(inbox, targets)
    try:
        _run(setup, transport)
    except UnsupportedModelError as error:
        transport.send(PARENT, Refused(name, error.cli_message))
        sys.exit(1)
    except BaseException as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        transport.send(PARENT, Failed(name, line, traceback.format_exc()))
        sys.exit(1)


def _open(fd: int, *, readable: bool) -> "Connection[Message, Message]":
    os.set_inheritable(fd, False)  # a process that vLLM starts must not keep the pipe open
    return Connection(fd, readable=readable, writable=not readable)


def _run(setup: EngineSetup, transport: MailTransport) -> None:
    from splitwiser.vllm_backend.engine import Engine  # imports vLLM, beside the other workers

    for shared in (setup.board, setup.weights, setup.pool, *setup.sources.values()):
        if shared is not None:
            os.set_inheritable(shared.fd, False)
    while not any(isinstance(message, StartEngine) for message in transport.receive()):
        if transport.stopped:
            return
        transport.wait()
    exchange = _make_exchange(setup, transport)
    engine = Engine(setup, exchange)
    _start_heartbeats(setup)
    ready = EngineReady(setup.spec.name, {}, engine.blocks, engine.block_tokens, engine.longest, engine.settings())
    transport.send(PARENT, ready)
    Worker(setup, engine, exchange, transport).run()


def _make_exchange(setup: EngineSetup, transport: MailTransport) -> "Exchange | None":
    if setup.pool is None:
        return None
    from splitwiser.vllm_backend.connector import Exchange
    from splitwiser.vllm_backend.engine import DEVICE
    from splitwiser.vllm_backend.sharing import open_pool

    pool = open_pool(setup.pool, DEVICE)
    # a process cannot map by CUDA IPC what it has itself
    sources = {name: pool if file == setup.pool else open_pool(file, DEVICE) for name, file in setup.sources.items()}
    return Exchange(pool, setup.first, setup.last, sources, transport.send)


def _start_heartbeats(setup: EngineSetup) -> None:
    from splitwiser.machine.pages import map_memory
    from splitwiser.placement.shares import Board

    board = Board.over(map_memory(setup.board.nbytes, setup.board.fd))

    def beat() -> None:
        while True:
            board.add_heartbeat(setup.index)
            time.sleep(HEARTBEAT_S)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


class Worker:
    """Runs an engine: adds what arrives, steps while there is work, and reports."""

    def __init__(
        self, setup: EngineSetup, engine: "Engine", exchange: "Exchange | None", transport: MailTransport
    ) -> None:
        self._name = setup.spec.name
        self._role = setup.role
        self._engine = engine
        self._exchange = exchange
        self._transport = transport

    def run(self) -> None:
        """Run until the parent says stop; wait while there is no work."""
        while not self._transport.stopped:
            must_step = False
            for message in self._transport.receive():
                must_step |= self._handle(message)
            step = self._engine.step() if must_step or self._engine.has_work else None
            if step is not None:
                self._report(step)
            elif not must_step and not self._transport.stopped:  # nothing to do, or no block free until a lease ends
                self._transport.wait()

    def _handle(self, message: Message) -> bool:
        """Process a message. Returns whether a step must follow though there may be nothing to compute."""
        match message:
            case Submit():
                self._engine.add(message.request)
            case SubmitPrefill():
                self._engine.add_prompt(message.request, message.decode_worker)
            case BlockHandoff():
                handed = Progress(self._name, 0, message.handoff.first_token_ns, (message.handoff,), (), ())
                self._transport.send(PARENT, handed)
                self._engine.add_handoff(message)
            case Cancel():
                self._cancel(message.request_id)
            case CancelPrefill():
                if not self._cancel(message.request_id):
                    self._transport.send(message.decode_worker, Cancel(message.request_id))
            case BlockReturn() if self._exchange:
                self._exchange.lender.end(message.lease, message.blocks)
                return True
            case WorkerGone():
                if self._exchange:
                    self._exchange.lender.reclaim(message.worker)
                    return True
            case _:
                raise TypeError(f"{self._name} ({self._role}) cannot handle {message}")
        return False

    def _cancel(self, request_id: int) -> bool:
        """End a request and report it; returns False if this engine does not have it."""
        if not self._engine.cancel(request_id):
            return False
        now_ns = time.perf_counter_ns()
        self._transport.send(PARENT, Progress(self._name, now_ns, now_ns, (), (), ((request_id, "cancelled"),)))
        return True

    def _report(self, step: "Step") -> None:
        record = StepRecord(
            self._name,
            self._role,
            step.phase,
            step.start_ns,
            step.end_ns,
            step.requests,
            step.tokens,
            step.decode_tokens,
        )
        self._transport.send(PARENT, record)
        handoffs, tokens, finished, logprobs = [], [], [], []
        for made in step.made:
            request_id = made.request.request_id
            first = Handoff(
                request_id,
                made.token,
                made.start_ns,
                step.end_ns,
                self._name,
                made.cached_tokens,
                made.logprobs,
                made.prompt_logprobs,
            )
            if made.lease is not None:
                self._transport.send(made.decode_worker, BlockHandoff(made.request, first, **made.lease))
                continue
            if made.is_first:
                handoffs.append(first)
            else:
                tokens.append((request_id, made.token))
                if made.logprobs is not None:
                    logprobs.append((request_id, made.logprobs))
            if made.reason is not None:
                finished.append((request_id, made.reason))
        if handoffs or tokens:
            self._transport.send(
                PARENT,
                Progress(
                    self._name,
                    step.start_ns,
                    step.end_ns,
                    tuple(handoffs),
                    tuple(tokens),
                    tuple(finished),
                    tuple(logprobs),
                ),
            )
