"""The parent's side: feeds requests to the workers as they arrive, collects what they report, and takes part in no step."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from splitwiser.engine.arrivals import Arrivals
from splitwiser.engine.messages import Message, Progress, StepRecord
from splitwiser.engine.sampling import final_text
from splitwiser.errors import InputError, RunError, WorkerLostError
from splitwiser.model.loading import LoadedModel
from splitwiser.request import FinishReason, Request, RequestMetrics, RequestOutput

_SETTLE_NS = 2_000_000  # how long the end of a run waits for step records that are still on their way


class Observer:
    """Is told of each step and each finished request while a run goes on; subclass it for what is wanted."""

    def on_step(self, record: StepRecord) -> None:
        """A worker ended a step."""

    def on_output(self, output: RequestOutput) -> None:
        """A request finished."""


class Engine(Protocol):
    """What runs requests, in every mode."""

    @property
    def capacity_tokens(self) -> int | None:
        """Most tokens (prompt and new) that one request can have, or None without such a limit."""
        ...

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of workers that run outside this process, by name."""
        ...

    def run(
        self, requests: Sequence[Request], observer: Observer, start_ns: int, max_concurrency: int | None = None
    ) -> list[RequestOutput]:
        """Answer every request, each not before its arrival; outputs in the order of ``requests``. ``start_ns`` is the
        moment of ``time.perf_counter_ns`` that arrivals count from; with ``max_concurrency`` requests arrive as others
        finish (:class:`~splitwiser.engine.arrivals.Arrivals`)."""
        ...

    def close(self) -> None:
        """Give up workers and memory."""
        ...


class Placement(Protocol):
    """Where the workers run."""

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of workers that run outside this process, by name."""
        ...

    def submit(self, request: Request) -> None:
        """Give a request to a decode worker."""
        ...

    def poll(self, until_ns: int | None) -> Sequence[Message]:
        """What the workers reported. Returns when there is something, or at ``until_ns`` (None: none is to come, or
        none before one finishes). Raises :class:`RunError` if nothing can come any more, and
        :class:`WorkerLostError` if a worker was lost."""
        ...

    def close(self) -> None:
        """Stop the workers."""
        ...


@dataclass
class _Open:
    request: Request
    metrics: RequestMetrics
    token_ids: list[int]


class SplitEngine:
    """Runs requests on the workers of a placement; the same for every mode but ``generate``."""

    def __init__(
        self,
        model: LoadedModel,
        placement: Placement,
        capacity_tokens: int,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self._model = model
        self._placement = placement
        self._clock = clock
        self._open: dict[int, _Open] = {}
        self._broken_off = False

    @property
    def pids(self) -> dict[str, int]:
        """See :meth:`Engine.pids`."""
        return self._placement.pids

    def run(
        self, requests: Sequence[Request], observer: Observer, start_ns: int, max_concurrency: int | None = None
    ) -> list[RequestOutput]:
        """See :meth:`Engine.run`."""
        if self._broken_off:
            raise RunError("an earlier run was broken off, and its requests are still under way; make a new LLM")
        self._broken_off = True
        outputs = self._run(requests, observer, start_ns, Arrivals(requests, start_ns, max_concurrency, self._clock))
        self._broken_off = False
        return outputs

    def _run(
        self, requests: Sequence[Request], observer: Observer, start_ns: int, arrivals: Arrivals
    ) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        self._open = {}
        while len(outputs) < len(requests):
            for request, arrival_ns in arrivals.due():
                self._submit(request, arrival_ns)
            try:
                messages = self._placement.poll(arrivals.next_ns)
            except WorkerLostError as lost:
                unanswered = sorted({*self._open, *arrivals.request_ids})
                raise _with_requests(lost, unanswered) from lost
            for message in messages:
                for output in self._hear(message, observer, start_ns):
                    outputs[output.request_id] = output
                    arrivals.finished(output.metrics.token_ns[-1])
        # the record of the last prefill step travels by another pipe than the report that ended the run
        with suppress(WorkerLostError):  # all are answered; the next run is told
            for message in self._placement.poll(self._clock() + _SETTLE_NS):
                self._hear(message, observer, start_ns)
        return [outputs[request.request_id] for request in requests]

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self._placement.close()

    def _hear(self, message: Message, observer: Observer, start_ns: int) -> list[RequestOutput]:
        """Take a worker's message in; the outputs that it completes."""
        match message:
            case StepRecord():
                if message.start_ns >= start_ns:  # else it belongs to the run before
                    observer.on_step(message)
                return []
            case Progress():
                outputs = self._take(message)
                for output in outputs:
                    observer.on_output(output)
                return outputs
        raise TypeError(f"the engine has no use for {message}")

    def _submit(self, request: Request, arrival_ns: int) -> None:
        self._open[request.request_id] = _Open(request, RequestMetrics(arrival_ns), [])
        self._placement.submit(request)

    def _take(self, progress: Progress) -> list[RequestOutput]:
        for handoff in progress.handoffs:
            opened = self._open[handoff.request_id]
            opened.token_ids.append(handoff.first_token)
            opened.metrics.prefill_start_ns = handoff.prefill_start_ns
            opened.metrics.token_ns.append(handoff.first_token_ns)
            opened.metrics.prefill_worker = handoff.prefill_worker
            opened.metrics.decode_worker = progress.worker
        for request_id, token in progress.tokens:
            opened = self._open[request_id]
            opened.token_ids.append(token)
            opened.metrics.token_ns.append(progress.time_ns)
            opened.metrics.decode_start_ns = opened.metrics.decode_start_ns or progress.start_ns
        return [self._finish(request_id, reason) for request_id, reason in progress.finished]

    def _finish(self, request_id: int, reason: FinishReason) -> RequestOutput:
        opened = self._open.pop(request_id)
        return make_output(self._model, opened.request, opened.token_ids, reason, opened.metrics)


def _with_requests(lost: WorkerLostError, unanswered: Sequence[int]) -> RunError:
    """``lost`` with the requests that it leaves without an answer."""
    named = ", ".join(map(str, unanswered[:20])) + (f" and {len(unanswered) - 20} more" if len(unanswered) > 20 else "")
    error = RunError(f"{lost}; not answered: requests {named}")
    for note in getattr(lost, "__notes__", []):
        error.add_note(note)
    return error


def make_output(
    model: LoadedModel, request: Request, token_ids: list[int], reason: FinishReason, metrics: RequestMetrics
) -> RequestOutput:
    """The output of a finished request, with its text."""
    return RequestOutput(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        token_ids=token_ids,
        text=final_text(request.params, token_ids, model.decode),
        finish_reason=reason,
        metrics=metrics,
    )


def check_fits(request: Request, model: LoadedModel, capacity_tokens: int | None) -> None:
    """Refuse a request that could never be served, with the figure it needs. Raises :class:`InputError`."""
    where = f"request {request.request_id}"
    prompt, new = len(request.prompt_token_ids), request.params.max_tokens
    if not prompt:
        raise InputError(f"{where}: the prompt has no tokens; at least one is needed")
    wrong = [token for token in request.prompt_token_ids if not 0 <= token < model.vocabulary]
    if wrong:
        raise InputError(f"{where}: token id {wrong[0]} is not in {model.name}'s vocabulary of {model.vocabulary}")
    if model.max_positions is not None and prompt + new - 1 > model.max_positions:
        raise InputError(
            f"{where}: {prompt} prompt tokens and {new} new ones need {prompt + new - 1} positions, and {model.name} has "
            f"{model.max_positions}; shorten the prompt or lower max_new_tokens"
        )
    if capacity_tokens is not None and request.most_tokens > capacity_tokens:
        raise InputError(
            f"{where}: {prompt} prompt tokens and {new} new ones need room for {request.most_tokens} tokens in the KV pool, "
            f"which holds {capacity_tokens}; raise kv_memory or lower max_new_tokens"
        )
