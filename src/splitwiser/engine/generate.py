"""Mode ``generate``: transformers' own ``model.generate`` over padded static batches.

It is the reference for tokens and the baseline for time. Each step is timed from inside ``generate``, so the mode writes
the same files as the others.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from splitwiser.engine.arrivals import Arrivals
from splitwiser.engine.engine import Observer, make_output
from splitwiser.engine.logprobs import token_logprobs
from splitwiser.engine.messages import Phase, StepRecord, TokenLogprobs
from splitwiser.engine.sampling import finish_reason, sample
from splitwiser.engine.steps import SequenceState
from splitwiser.machine.fair_share import OwnThreads
from splitwiser.model.forward import takes_rows
from splitwiser.model.loading import LoadedModel
from splitwiser.model.rotary import forget_lengths
from splitwiser.request import Adapter, FinishReason, Request, RequestMetrics, RequestOutput

WORKER = "generate-0"

_ArrivedRequest = tuple[Request, int]  # a request and its arrival time in nanoseconds
WithAdapter = Callable[[Adapter], AbstractContextManager[Callable[..., Tensor]]]
"""Gives transformers' ``generate`` of a model with an adapter, for as long as a block lasts."""


@dataclass(eq=False)
class _Row:
    """One request as a row of a padded batch; ``finish`` is None until it has finished."""

    sequence: SequenceState
    metrics: RequestMetrics
    finish: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class _Sampler(LogitsProcessor):
    """Keeps of each row's logits only the token that :func:`sample` chooses, so that tokens are those of the other
    modes (transformers draws a whole batch from one generator, penalises its padding and has settings by batch)."""

    def __init__(self, model: LoadedModel, rows: Sequence[_Row]) -> None:
        self._model = model
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        model, sequences = self._model, [row.sequence for row in self._rows]
        sampled = sample(scores, sequences, model.eos_token_ids, model.start_token_id)
        for row, logprobs in zip(self._rows, sampled.logprobs, strict=False):
            if logprobs and row.finish is None:
                row.logprobs.append(logprobs)
        kept = torch.tensor(sampled.tokens, device=scores.device)
        return torch.full_like(scores, float("-inf")).scatter(-1, kept.unsqueeze(-1), 0.0)


class _StepTracker(StoppingCriteria):
    """Called once a step with all tokens so far: records their times, reports the step and returns which rows are done."""

    def __init__(
        self,
        model: LoadedModel,
        rows: Sequence[_Row],
        observer: Observer,
        threads: OwnThreads,
        cancelled: Collection[int],
    ) -> None:
        self._model = model
        self._cancelled = cancelled
        self._rows = rows
        self._observer = observer
        self._threads = threads
        self._last_ns = time.perf_counter_ns()
        self._step_tokens = sum(len(row.sequence.request.prompt_token_ids) for row in rows)
        for row in rows:
            row.metrics.prefill_start_ns = self._last_ns

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        tokens = input_ids[:, -1].tolist()  # synchronises with the device
        now_ns = time.perf_counter_ns()
        phase: Phase = "decode" if any(row.sequence.token_ids for row in self._rows) else "prefill"
        record = StepRecord(
            WORKER, "mixed", phase, self._last_ns, now_ns, len(self._rows), self._step_tokens,
            self._step_tokens if phase == "decode" else 0,
        )  # fmt: skip
        self._last_ns = now_ns
        for row, token in zip(self._rows, tokens, strict=True):
            if row.finish is None:
                row.sequence.token_ids.append(token)
                row.metrics.token_ns.append(now_ns)
                if phase == "decode":
                    row.metrics.decode_start_ns = row.metrics.decode_start_ns or record.start_ns
                row.finish = finish_reason(
                    row.sequence.params, row.sequence.token_ids, self._model.eos_token_ids, self._model.decode
                )
                if row.finish is None and row.sequence.request.request_id in self._cancelled:
                    row.finish, row.metrics.cancelled_ns = "cancelled", now_ns
        self._observer.on_step(record)
        self._threads.before_step()
        self._step_tokens = sum(row.finish is None for row in self._rows)  # finished rows are still computed
        return torch.tensor([row.finish is not None for row in self._rows], device=input_ids.device)


class GenerateEngine:
    """Generates batch after batch: up to ``batch_size`` requests that have arrived, padded, until all are done.

    A batch is split into parts that run one after another where its padded rows would exceed the model's last position
    or, with ``one_length`` or virtual tokens, where its prompts differ in length; and where its requests differ in their
    adapter. ``using`` gives the ``generate`` of the model with an adapter.
    """

    capacity_tokens: int | None = None
    pids: ClassVar[dict[str, int]] = {}

    def __init__(
        self, model: LoadedModel, batch_size: int, one_length: bool = False, using: WithAdapter | None = None
    ) -> None:
        self._model = model
        self._batch_size = batch_size
        self._one_length = one_length
        self._using = using or self._without_adapter
        self._threads = OwnThreads(model.device.type == "cpu")
        self._cancelled: set[int] = set()
        self._woken = threading.Event()

    def run(
        self, requests: Sequence[Request], observer: Observer, start_ns: int, max_concurrency: int | None = None
    ) -> list[RequestOutput]:
        """See :meth:`splitwiser.engine.engine.Engine.run`."""
        outputs: dict[int, RequestOutput] = {}
        arrivals = Arrivals(requests, start_ns, max_concurrency)
        self._cancelled.clear()  # of the run before
        try:
            while (next_ns := arrivals.next_ns) is not None:
                if self._woken.wait(max(0, next_ns - time.perf_counter_ns()) / 1e9):
                    self._woken.clear()
                    for request in filter(None, map(arrivals.remove, tuple(self._cancelled))):
                        now_ns = time.perf_counter_ns()
                        metrics = RequestMetrics(now_ns, cancelled_ns=now_ns)
                        output = make_output(self._model.decode, request, [], "cancelled", metrics)
                        outputs[output.request_id] = output
                        observer.on_output(output)
                    continue
                for part in self._split(list(islice(arrivals.due(), self._batch_size))):
                    with self._threads.use():
                        made = self._generate(part, observer)
                    for output in made:
                        outputs[output.request_id] = output
                        arrivals.record_finish(output.metrics.finish_ns)
                        observer.on_output(output)
        finally:
            self._threads.release()
        return [outputs[request.request_id] for request in requests]

    def cancel(self, request_ids: Iterable[int]) -> None:
        """See :meth:`splitwiser.engine.engine.Engine.cancel`; one that has arrived ends with the next step that it is in."""
        self._cancelled.update(request_ids)
        self._woken.set()

    def close(self) -> None:
        """See :meth:`splitwiser.engine.engine.Engine.close`; nothing runs outside this thread."""

    def _split(self, arrived: Sequence[_ArrivedRequest]) -> list[list[_ArrivedRequest]]:
        """Split a batch into parts that can each be padded together."""
        parts: list[list[_ArrivedRequest]] = []
        for each in arrived:
            part = next((part for part in parts if self._fit_together([*part, each])), None)
            if part is None:
                parts.append([each])
            else:
                part.append(each)
        return parts

    def _without_adapter(self, _: Adapter) -> AbstractContextManager[Callable[..., Tensor]]:
        return nullcontext(cast("Callable[..., Tensor]", self._model.module.generate))

    def _fit_together(self, arrived: Sequence[_ArrivedRequest]) -> bool:
        adapter = arrived[0][0].adapter
        if any(request.adapter.name != adapter.name for request, _ in arrived):
            return False
        lengths = {len(request.prompt_token_ids) for request, _ in arrived}
        if (self._one_length or adapter.virtual_tokens) and len(lengths) > 1:
            return False
        # a finished row runs on beside the others, and takes as many positions
        prompt_tokens, new_tokens = max(lengths), max(request.max_tokens for request, _ in arrived)
        positions = self._model.positions_needed(adapter.virtual_tokens + prompt_tokens, new_tokens)
        return self._model.max_positions is None or positions <= self._model.max_positions

    def _generate(self, arrived: Sequence[_ArrivedRequest], observer: Observer) -> list[RequestOutput]:
        batch = [request for request, _ in arrived]
        rows = [
            _Row(
                SequenceState(request, blocks=()),
                RequestMetrics(arrival_ns, prefill_worker=WORKER, decode_worker=WORKER),
            )
            for request, arrival_ns in arrived
        ]
        ids, mask = self._model.pad([request.prompt_token_ids for request in batch])
        # without an end-of-sequence token, generate leaves the end of a row to the rule that all modes share
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max(request.max_tokens for request in batch), pad_token_id=0
        )
        plain = all(
            each.params.temperature == 0 and not each.params.changes_logits and each.params.logprobs is None
            for each in batch
        )
        tracker = _StepTracker(self._model, rows, observer, self._threads, self._cancelled)
        forget_lengths(self._model.module)
        with self._using(batch[0].adapter) as generate, _prompt_logprobs(self._model, rows) as keep_logits:
            generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([] if plain else [_Sampler(self._model, rows)]),
                stopping_criteria=StoppingCriteriaList([tracker]),
                **keep_logits,
            )
        return [
            make_output(
                self._model.decode, row.sequence.request, row.sequence.token_ids, row.finish or "length", row.metrics,
                row.logprobs, row.sequence.prompt_logprobs,
            )
            for row in rows
        ]  # fmt: skip


@contextmanager
def _prompt_logprobs(model: LoadedModel, rows: Sequence[_Row]) -> Iterator[dict[str, int]]:
    """Context in which the first forward, that of the prompts, gives the rows that ask for it the log-probabilities of their
    prompts. Yields what ``generate`` needs to be told so that the forward has the logits of all tokens."""
    asking = [
        (number, row.sequence) for number, row in enumerate(rows) if row.sequence.params.prompt_logprobs is not None
    ]
    if not asking:
        yield {}
        return

    def keep(_module: object, _given: object, output: Any) -> None:  # noqa: ANN401  # the model's own class of output
        hook.remove()
        for number, sequence in asking:
            following = torch.tensor(sequence.request.prompt_token_ids[1:], device=model.device)
            logits = output.logits[number, -1 - len(following) : -1]  # prompts are padded on the left
            counts = [sequence.params.prompt_logprobs or 0] * len(following)
            sequence.prompt_logprobs += token_logprobs(logits, following, counts)

    hook = model.module.register_forward_hook(keep)
    try:
        yield {"logits_to_keep": 0} if takes_rows(model.module) else {}
    finally:
        hook.remove()
