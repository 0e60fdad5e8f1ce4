"""Simulates a run with the engine's own parent loop, workers and schedulers, and predicted step times.

Only two things differ from a real run: a step does not run but lasts as :class:`~splitwiser.study.step_times.StepCosts`
predicts, and the clock jumps from one event to the next. Every worker runs in its own thread, only one of them at a time,
so the simulation is deterministic. While several workers are in a step, each advances at the rate given by
:class:`Conditions`, and more slowly if they use more threads than there are cores; the duration of a step therefore
depends on what runs concurrently.

The transfer time of messages and other load on the machine are not modelled.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from splitwiser import constants
from splitwiser.engine.engine import Observer, SplitEngine
from splitwiser.engine.messages import PARENT, Cancel, Message, Progress, StepPhase, Submit, Wake, WorkerSpec
from splitwiser.engine.policy import FIRST_COME, Policy, Router
from splitwiser.engine.prefixes import may_share
from splitwiser.engine.sampling import Sampled
from splitwiser.engine.schedule import ALTERNATE, Schedule
from splitwiser.engine.steps import Chunk, SequenceState
from splitwiser.engine.worker import SchedulerSettings, build_worker, run_worker
from splitwiser.errors import InputError, RunError
from splitwiser.placement.cores import claim_threads, plan_levels
from splitwiser.placement.layout import WorkerLayout
from splitwiser.placement.shares import Board, WorkerShare
from splitwiser.request import FinishReason, Request, RequestOutput, SamplingParams
from splitwiser.results.schema import column
from splitwiser.study.step_times import StepCosts, nearest_costs

_TOKEN = 0  # the token that every simulated step draws
_NOTHING_S = 1e-12  # seconds of remaining work below which a step has ended


@dataclass(frozen=True)
class Conditions:
    """How steps in a placement differ from those of the profile: factors on their time, alone and concurrent with another
    worker's step, and the seconds between two iterations of a worker."""

    prefill_alone: float = column("Factor on the time of a prefill step that runs alone.", default=1.0)
    decode_alone: float = column("Factor on the time of a decode step that runs alone.", default=1.0)
    prefill_beside: float = column(
        "Factor on the time of a prefill step concurrent with another worker's.", default=1.0
    )
    decode_beside: float = column("Factor on the time of a decode step concurrent with another worker's.", default=1.0)
    gap_s: float = column("Time between two iterations of a worker.", "s", default=0.0)

    def factor(self, phase: StepPhase, beside: bool) -> float:
        """Return the factor on the time of a step of ``phase``: of a hybrid one, the mean of both phases'."""
        if phase == "hybrid":
            return (self.factor("prefill", beside) + self.factor("decode", beside)) / 2
        if phase == "prefill":
            return self.prefill_beside if beside else self.prefill_alone
        return self.decode_beside if beside else self.decode_alone


@dataclass(frozen=True)
class Machine:
    """A simulated machine: step costs by thread count, cores (None where threads do not divide the device, as on a
    GPU), and blocks of the KV pool."""

    costs: Mapping[int, StepCosts]
    cores: int | None
    blocks: int
    block_tokens: int = constants.BLOCK_TOKENS


@dataclass(frozen=True)
class Setup:
    """The set-up of a simulated run: its workers (one ``mixed`` worker is mode ``sequential``) and the engine's options."""

    layout: WorkerLayout
    prefill_tokens: int
    max_batch: int
    lend: bool = True
    policy: Policy = FIRST_COME
    schedule: Schedule = ALTERNATE
    itl_target_s: float | None = None
    reserve: bool = False
    prefix_caching: bool = False


def simulate(
    requests: Sequence[Request],
    machine: Machine,
    setup: Setup,
    conditions: Conditions,
    output_tokens: Mapping[int, int] | None = None,
    observer: Observer | None = None,
    max_concurrency: int | None = None,
) -> list[RequestOutput]:
    """Return the predicted outputs of ``requests``, with times in nanoseconds from 0 and meaningless tokens.

    Requests arrive as in :meth:`splitwiser.engine.engine.Engine.run`. ``output_tokens`` gives the number of tokens after
    which a request ends by itself, by request id (default: its maximum). Raises :class:`InputError` for one that never fits.
    """
    lengths = {request.request_id: request.max_tokens for request in requests} | dict(output_tokens or {})
    # stop strings and end-of-sequence cannot be predicted: a request ends at its length. Who shares blocks has to be known
    kept = ("max_tokens", "n", "prompt_logprobs")
    plain = [
        replace(each, params=SamplingParams(**{name: getattr(each.params, name) for name in kept})) for each in requests
    ]
    owners = sum(spec.role != "prefill" for spec in setup.layout.workers)
    most = max(request.max_kv_tokens for request in requests)
    if -(-most // machine.block_tokens) > machine.blocks // owners:
        raise InputError(
            f"a request needs room for {most} tokens in the KV pool, of which each worker that decodes owns "
            f"{machine.blocks // owners * machine.block_tokens}; raise --kv_memory"
        )
    placement = _SimulatedPlacement(machine, setup, conditions, lengths)
    try:
        engine = SplitEngine(_no_text, placement, machine.blocks * machine.block_tokens, placement.now_ns)
        return engine.run(plain, observer or Observer(), 0, max_concurrency)
    finally:
        placement.close()


class _SimulatedPlacement:
    """Workers that run in simulated time; see :class:`splitwiser.engine.engine.Placement`. Each decode or mixed worker
    owns an equal number of blocks, as in mode ``mp``."""

    pids: ClassVar[dict[str, int]] = {}

    def __init__(self, machine: Machine, setup: Setup, conditions: Conditions, lengths: Mapping[int, int]) -> None:
        self.machine = machine
        self.setup = setup
        self.lengths = lengths
        self.outbox: list[Message] = []
        self.specs = setup.layout.workers
        self.board = Board.over(torch.zeros(Board.nbytes(len(self.specs)), dtype=torch.uint8))
        self.levels = plan_levels(self.specs, machine.cores, "fixed") if machine.cores else [[0] * len(self.specs)]
        self.gap_s = conditions.gap_s
        self._conditions = conditions
        self._now_s = 0.0
        owners = [spec for spec in self.specs if spec.role != "prefill"]
        part = machine.blocks // len(owners)
        shares = partial(may_share, prefix_caching=setup.prefix_caching)
        self._router = Router({spec.name: part for spec in owners}, machine.block_tokens, shares)
        self.workers = {spec.name: _SimulatedWorker(self, place, spec, part) for place, spec in enumerate(self.specs)}

    def now_ns(self) -> int:
        """The simulated time."""
        return round(self._now_s * 1e9)

    def submit(self, request: Request, arrival_ns: int) -> None:
        """See :meth:`splitwiser.placement.processes.ProcessPlacement.submit`."""
        self.workers[self._router.choose(request)].inbox.append(Submit(request, arrival_ns))

    def cancel(self, request_id: int) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.cancel`."""
        self.workers[self._router.owner(request_id)].inbox.append(Cancel(request_id))

    def wake(self) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.wake`."""
        self.outbox.append(Wake())

    def poll(self, until_ns: int | None) -> Sequence[Message]:
        """See :meth:`splitwiser.engine.engine.Placement.poll`."""
        until_s = None if until_ns is None else max(self._now_s, until_ns / 1e9)
        while not self.outbox:
            called = [worker for worker in self.workers.values() if worker.is_idle and worker.inbox]
            if called:
                called[0].go_on()
                continue
            busy = [worker for worker in self.workers.values() if not worker.is_idle]
            if not busy:
                if until_s is None:
                    raise RunError("simulation: requests are unfinished, but no worker can proceed")
                self._now_s = until_s
                return []
            rates = {worker: self._rate(worker) for worker in busy}
            passed_s = min(worker.left_s / rate for worker, rate in rates.items())
            cut = until_s is not None and self._now_s + passed_s > until_s
            if until_s is not None and cut:
                passed_s = until_s - self._now_s
            self._now_s += passed_s
            for worker, rate in rates.items():
                worker.left_s = max(0.0, worker.left_s - passed_s * rate)
            if cut:
                return []
            for worker in busy:
                if worker.left_s <= _NOTHING_S:
                    worker.go_on()
        messages, self.outbox = self.outbox, []
        for message in messages:
            if isinstance(message, Progress):
                for request_id, _ in message.finished:
                    self._router.release(request_id)
        return messages

    def close(self) -> None:
        """End the workers' threads."""
        for worker in self.workers.values():
            worker.end()

    def _rate(self, worker: "_SimulatedWorker") -> float:
        """Return the speed of ``worker``'s step relative to the profile; 1 between two steps."""
        if worker.phase is None:
            return 1.0
        stepping = [each for each in self.workers.values() if each.phase is not None and not each.is_idle]
        rate = 1 / self._conditions.factor(worker.phase, beside=len(stepping) > 1)
        if self.machine.cores:
            rate *= min(1.0, self.machine.cores / sum(each.step_threads for each in stepping))
        return rate


class _SimulatedWorker:
    """A worker in its own thread, which runs only from :meth:`go_on` until it spends time or has nothing to do."""

    def __init__(self, world: _SimulatedPlacement, place: int, spec: WorkerSpec, part: int) -> None:
        self.inbox: deque[Message] = deque()
        self.stopped = False  # never: the simulation ends its thread instead
        self.is_idle = True
        self.left_s = 0.0
        self.phase: StepPhase | None = None
        self.step_threads = 0
        self._world = world
        self._share = WorkerShare(world.board, place, world.setup.lend)
        self._error: BaseException | None = None
        self._ended = False
        self._stepped = False
        self._may_go = threading.Semaphore(0)
        self._has_stopped = threading.Semaphore(0)
        setup = world.setup
        scheduling = SchedulerSettings(
            setup.max_batch,
            setup.prefill_tokens,
            world.machine.block_tokens,
            setup.policy,
            setup.schedule,
            setup.itl_target_s,
            setup.reserve,
            setup.prefix_caching,
        )
        self._worker = build_worker(world.specs, place, self, _CostStepper(self, world), range(part), scheduling)
        self._thread = threading.Thread(target=self._live, name=f"simulated {spec.name}", daemon=True)
        self._thread.start()

    def receive(self) -> list[Message]:
        """See :meth:`splitwiser.engine.worker.Transport.receive`."""
        messages = list(self.inbox)
        self.inbox.clear()
        return messages

    def send(self, to: str, message: Message) -> None:
        """See :meth:`splitwiser.engine.worker.Transport.send`; messages take no time."""
        (self._world.outbox if to == PARENT else self._world.workers[to].inbox).append(message)

    def step(self, phase: StepPhase, seconds: float) -> None:
        """Spend the time of a step of ``phase`` that takes ``seconds`` if nothing runs concurrently."""
        self._stepped = True
        self.phase = phase
        self._spend(seconds)
        self.phase = None

    def go_on(self) -> None:
        """Resume the worker; returns when it has paused again. Raises the worker's exception."""
        self._may_go.release()
        self._has_stopped.acquire()
        if self._error:
            raise self._error

    def end(self) -> None:
        """End the thread."""
        self._ended = True
        self._may_go.release()
        self._thread.join()

    def wait(self) -> None:
        """See :class:`splitwiser.engine.worker.WaitableTransport`."""
        if not self.inbox:
            self.is_idle = True
            self._stop()
            self.is_idle = False

    @contextmanager
    def use(self) -> Iterator[None]:
        """See :meth:`splitwiser.engine.worker.DeviceShare.use`."""
        self.step_threads = claim_threads(self._share, self._world.levels, self._world.machine.cores or 0)
        self._stepped = False
        yield
        if self._stepped:
            self._spend(self._world.gap_s)  # the parent may act between two iterations

    def release(self) -> None:
        """See :meth:`splitwiser.engine.worker.DeviceShare.release`."""
        self._share.release()

    def _live(self) -> None:
        try:
            self._wait()
            self.is_idle = False
            run_worker(self._worker, self, self)
        except _EndedError:
            return
        except BaseException as error:
            self._error = error
            self._has_stopped.release()

    def _spend(self, seconds: float) -> None:
        self.left_s = seconds
        self._stop()

    def _stop(self) -> None:
        self._has_stopped.release()
        self._wait()

    def _wait(self) -> None:
        self._may_go.acquire()
        if self._ended:
            raise _EndedError


class _EndedError(BaseException):
    """The simulation is over."""


class _CostStepper:
    """The :class:`~splitwiser.engine.steps.Stepper` of a simulated worker: a step lasts its predicted time, and a
    request ends at its length."""

    def __init__(self, worker: _SimulatedWorker, world: _SimulatedPlacement) -> None:
        self._worker = worker
        self._world = world

    def prefill(self, chunks: Sequence[Chunk]) -> Sampled:
        """See :meth:`splitwiser.engine.steps.Stepper.prefill`."""
        self._worker.step("prefill", self._costs().prefill([(chunk.start, chunk.tokens) for chunk in chunks]))
        return Sampled([_TOKEN for chunk in chunks if chunk.is_last])

    def decode(self, sequences: Sequence[SequenceState]) -> Sampled:
        """See :meth:`splitwiser.engine.steps.Stepper.decode`."""
        self._worker.step("decode", self._costs().decode(len(sequences), _context(sequences)))
        return Sampled([_TOKEN] * len(sequences))

    def hybrid(self, chunks: Sequence[Chunk], sequences: Sequence[SequenceState]) -> tuple[Sampled, Sampled]:
        """See :meth:`splitwiser.engine.steps.Stepper.hybrid`."""
        sizes = [(chunk.start, chunk.tokens) for chunk in chunks]
        self._worker.step("hybrid", self._costs().hybrid(sizes, len(sequences), _context(sequences)))
        return Sampled([_TOKEN for chunk in chunks if chunk.is_last]), Sampled([_TOKEN] * len(sequences))

    def finish_reason(self, sequence: SequenceState) -> FinishReason | None:
        """See :meth:`splitwiser.engine.steps.Stepper.finish_reason`."""
        return "length" if sequence.drawn >= self._world.lengths[sequence.request.request_id] else None

    def now_ns(self) -> int:
        """The simulated time."""
        return self._world.now_ns()

    def _costs(self) -> StepCosts:
        return nearest_costs(self._world.machine.costs, self._worker.step_threads)


def _context(sequences: Sequence[SequenceState]) -> int:
    """Return the number of tokens that ``sequences`` have in the pool together."""
    return sum(len(each.request.prompt_token_ids) + each.drawn for each in sequences)


def _no_text(_: Sequence[int]) -> str:
    return ""
