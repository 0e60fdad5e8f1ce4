"""The parent's loop: submits requests to the workers as they arrive and collects what they report; runs no step itself."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from splitwiser.engine.arrivals import Arrivals
from splitwiser.engine.logprobs import with_text
from splitwiser.engine.messages import Message, Progress, StepRecord, TokenLogprobs, Wake
from splitwiser.engine.sampling import Decode, final_text
from splitwiser.errors import InputError, RunError, WorkerLostError
from splitwiser.model.loading import LoadedModel
from splitwiser.request import NO_ADAPTER, FinishReason, Request, RequestMetrics, RequestOutput

_SETTLE_NS = 2_000_000  # how long a run waits at its end for step records that are still in transit


class Observer:
    """Callbacks for each step and each finished request of a run; subclass it and override what is needed."""

    def on_step(self, record: StepRecord) -> None:
        """Called when a worker has finished a step."""

    def on_output(self, output: RequestOutput) -> None:
        """Called when a request has finished, or has been cancelled."""


class Engine(Protocol):
    """Interface of the engines of all modes."""

    @property
    def capacity_tokens(self) -> int | None:
        """Largest number of tokens (prompt and new) that the KV pool holds for one request; None if there is no limit."""
        ...

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of workers that run outside this process, by name."""
        ...

    def run(
        self, requests: Sequence[Request], observer: Observer, start_ns: int, max_concurrency: int | None = None
    ) -> list[RequestOutput]:
        """Run all requests, none before its arrival, and return their outputs in the order of ``requests``.

        Arrival times count from ``start_ns``, a value of ``time.perf_counter_ns``; with ``max_concurrency``, requests
        arrive as others finish (:class:`~splitwiser.engine.arrivals.Arrivals`). Raises :class:`RunError`."""
        ...

    def cancel(self, request_ids: Iterable[int]) -> None:
        """End requests of the run that goes on: each has an output with the tokens that it has come to and the finish reason
        ``cancelled``, and its blocks are free within a step. May be called from any thread and from an observer; ids of
        requests that have finished, or that are not in the run, are ignored."""
        ...

    def close(self) -> None:
        """Stop the workers and release their memory."""
        ...


class Placement(Protocol):
    """Interface to the workers, wherever they run."""

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of workers that run outside this process, by name."""
        ...

    def submit(self, request: Request, arrival_ns: int) -> None:
        """Send a request that arrived at ``arrival_ns`` to a decode worker."""
        ...

    def cancel(self, request_id: int) -> None:
        """Tell the decode worker of a request that has not finished to end it."""
        ...

    def wake(self) -> None:
        """Have :meth:`poll` return soon; may be called from any thread."""
        ...

    def poll(self, until_ns: int | None) -> Sequence[Message]:
        """Return what the workers reported: as soon as there is something, or nothing at ``until_ns``.

        ``until_ns`` is None where no arrival is due: no request is left, or the next one waits for another to finish.
        Raises :class:`RunError` if the workers can make no progress, :class:`WorkerLostError` if one was lost."""
        ...

    def close(self) -> None:
        """Stop the workers."""
        ...


@dataclass
class _OpenRequest:
    request: Request
    metrics: RequestMetrics
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs] = ()


class SplitEngine:
    """Runs requests on the workers of a placement: the engine of every mode except ``generate``. ``decode`` gives the text
    of an answer's tokens."""

    def __init__(
        self,
        decode: Decode,
        placement: Placement,
        capacity_tokens: int,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self._decode = decode
        self._placement = placement
        self._clock = clock
        self._open: dict[int, _OpenRequest] = {}
        self._cancels: deque[int] = deque()
        self._interrupted = False

    @property
    def pids(self) -> dict[str, int]:
        """See :meth:`Engine.pids`."""
        return self._placement.pids

    def run(
        self, requests: Sequence[Request], observer: Observer, start_ns: int, max_concurrency: int | None = None
    ) -> list[RequestOutput]:
        """See :meth:`Engine.run`."""
        if self._interrupted:
            raise RunError("an earlier run was interrupted, and its requests are still in the workers; make a new LLM")
        self._interrupted = True
        self._cancels.clear()  # of the run before
        outputs = self._run(requests, observer, start_ns, Arrivals(requests, start_ns, max_concurrency, self._clock))
        self._interrupted = False
        return outputs

    def cancel(self, request_ids: Iterable[int]) -> None:
        """See :meth:`Engine.cancel`."""
        self._cancels.extend(request_ids)
        self._placement.wake()

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
                raise _name_unanswered(lost, unanswered) from lost
            for message in messages:
                for output in self._handle(message, observer, start_ns):
                    outputs[output.request_id] = output
                    arrivals.record_finish(output.metrics.finish_ns)
            while self._cancels:
                if unarrived := self._cancel(self._cancels.popleft(), arrivals):
                    outputs[unarrived.request_id] = unarrived
                    observer.on_output(unarrived)
        # the record of the last prefill step comes through another pipe than the report that ended the run
        with suppress(WorkerLostError):  # all requests are answered; the next run raises it
            for message in self._placement.poll(self._clock() + _SETTLE_NS):
                self._handle(message, observer, start_ns)
        return [outputs[request.request_id] for request in requests]

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self._placement.close()

    def _handle(self, message: Message, observer: Observer, start_ns: int) -> list[RequestOutput]:
        """Process a worker's message and return the outputs that it completes."""
        match message:
            case StepRecord():
                if message.start_ns >= start_ns:  # else it belongs to the previous run
                    observer.on_step(message)
                return []
            case Wake():
                return []
            case Progress():
                outputs = self._record_progress(message)
                for output in outputs:
                    observer.on_output(output)
                return outputs
        raise TypeError(f"the engine cannot handle {message}")

    def _submit(self, request: Request, arrival_ns: int) -> None:
        self._open[request.request_id] = _OpenRequest(request, RequestMetrics(arrival_ns))
        self._placement.submit(request, arrival_ns)

    def _record_progress(self, progress: Progress) -> list[RequestOutput]:
        for handoff in progress.handoffs:
            opened = self._open[handoff.request_id]
            metrics = opened.metrics
            if opened.token_ids:  # it was preempted, and goes on
                metrics.preemptions += 1
            else:
                metrics.prefill_start_ns = handoff.prefill_start_ns
                metrics.prefill_worker, metrics.decode_worker = handoff.prefill_worker, progress.worker
                metrics.cached_tokens = handoff.cached_tokens
                opened.prompt_logprobs = handoff.prompt_logprobs
            opened.token_ids.append(handoff.first_token)
            metrics.token_ns.append(handoff.first_token_ns)
            if handoff.logprobs is not None:
                opened.logprobs.append(handoff.logprobs)
        for request_id, token in progress.tokens:
            opened = self._open[request_id]
            opened.token_ids.append(token)
            opened.metrics.token_ns.append(progress.time_ns)
            opened.metrics.decode_start_ns = opened.metrics.decode_start_ns or progress.start_ns
        for request_id, logprobs in progress.logprobs:
            self._open[request_id].logprobs.append(logprobs)
        return [self._finish(request_id, reason, progress) for request_id, reason in progress.finished]

    def _cancel(self, request_id: int, arrivals: Arrivals) -> RequestOutput | None:
        """Have a request cancelled. Returns its output if it has not arrived yet, which is empty."""
        if request_id in self._open:
            self._placement.cancel(request_id)
        elif request := arrivals.remove(request_id):
            now_ns = self._clock()
            return make_output(self._decode, request, [], "cancelled", RequestMetrics(now_ns, cancelled_ns=now_ns))
        return None

    def _finish(self, request_id: int, reason: FinishReason, progress: Progress) -> RequestOutput:
        opened = self._open.pop(request_id)
        if reason == "cancelled":
            opened.metrics.cancelled_ns = progress.start_ns  # before the step, in which it took no part
        return make_output(
            self._decode,
            opened.request,
            opened.token_ids,
            reason,
            opened.metrics,
            opened.logprobs,
            opened.prompt_logprobs,
        )


def _name_unanswered(lost: WorkerLostError, unanswered: Sequence[int]) -> RunError:
    """Return ``lost`` as an error that also names the requests left unanswered."""
    named = ", ".join(map(str, unanswered[:20])) + (f" and {len(unanswered) - 20} more" if len(unanswered) > 20 else "")
    error = RunError(f"{lost}; not answered: requests {named}")
    for note in getattr(lost, "__notes__", []):
        error.add_note(note)
    return error


def make_output(
    decode: Decode,
    request: Request,
    token_ids: list[int],
    reason: FinishReason,
    metrics: RequestMetrics,
    logprobs: Sequence[TokenLogprobs] = (),
    prompt_logprobs: Sequence[TokenLogprobs] = (),
) -> RequestOutput:
    """Return the output of a finished request, with its text, and with the log-probabilities of its tokens and of its
    prompt's from the second on if it asks for them."""
    params = request.params
    return RequestOutput(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        token_ids=token_ids,
        text=final_text(params, token_ids, decode),
        finish_reason=reason,
        metrics=metrics,
        adapter=None if request.adapter is NO_ADAPTER else request.adapter.name,
        priority=request.priority,
        logprobs=None if params.logprobs is None else with_text(logprobs, decode),
        prompt_id=request.prompt_id,
        sample=request.sample,
        prompt_logprobs=None if params.prompt_logprobs is None else [None, *with_text(prompt_logprobs, decode)],
    )


def check_fits(request: Request, model: LoadedModel, capacity_tokens: int | None) -> None:
    """Raise :class:`InputError`, with the limit that is exceeded, for a request that could never be served."""
    where = f"request {request.request_id}"
    if not request.prompt_token_ids:
        raise InputError(f"{where}: the prompt has no tokens; at least one is needed")
    used = {
        "": request.prompt_token_ids,
        "stop_token_ids: ": request.params.stop_token_ids,
        "logit_bias: ": request.params.logit_bias or (),
    }
    for name, ids in used.items():
        wrong = [token for token in ids if not 0 <= token < model.vocabulary]
        if wrong:
            raise InputError(
                f"{where}: {name}token id {wrong[0]} is not in {model.name}'s vocabulary of {model.vocabulary}"
            )
    if request.encoded and request.params.prompt_logprobs is not None:
        raise InputError(
            f"{where}: prompt_logprobs are of a decoder's prompts, and {model.name} has an encoder read them"
        )
    virtual, prompt, new = request.adapter.virtual_tokens, len(request.prompt_token_ids), request.max_tokens
    tokens = f"{f'{virtual} virtual tokens, ' if virtual else ''}{prompt} prompt tokens"
    needed = model.positions_needed(virtual + prompt, new)
    if model.max_positions is not None and needed > model.max_positions:
        raise InputError(
            f"{where}: {tokens} and {new} new ones need {needed} positions, and {model.name} has {model.max_positions}; "
            "shorten the prompt or ask for fewer tokens"
        )
    if capacity_tokens is not None and request.max_kv_tokens > capacity_tokens:
        raise InputError(
            f"{where}: {tokens} and {new} new ones need room for {request.max_kv_tokens} tokens in the KV "
            f"pool, which holds {capacity_tokens}; raise --kv_memory or ask for fewer tokens"
        )
