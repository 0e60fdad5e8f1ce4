"""A progress bar of a run, over the output tokens that its requests are expected to need."""

import sys
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

from splitwiser.engine.engine import Observer
from splitwiser.engine.messages import StepRecord
from splitwiser.request import Request, RequestOutput


class ProgressBar(Observer):
    """Forwards steps and outputs to ``observer``, and shows a progress bar of the output tokens on standard error.

    How many tokens a request needs that may end before its ``max_tokens`` is estimated from those that have finished: the
    same fraction of their maximum. Until one has, no time left is shown.
    """

    def __init__(self, observer: Observer, requests: Sequence[Request], description: str) -> None:
        self._observer = observer
        self._open = {request.request_id: request for request in requests}
        self._count = len(requests)
        self._finished_tokens = 0
        self._exact_tokens = 0  # of open requests that generate all of their max_tokens
        self._open_maximum = 0  # tokens of the other open requests, at most
        self._early_tokens = 0  # tokens of the other finished requests
        self._early_maximum = 0  # and how many they were allowed
        for request in requests:
            self._add(request, 1)
        self._bar = tqdm(
            total=self._expected(),
            desc=description,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            mininterval=0.1 if sys.stderr.isatty() else 5,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._show(0)
        self._bar.close()

    def on_step(self, record: StepRecord) -> None:
        """Count the tokens that a step makes of requests in decode."""
        self._observer.on_step(record)
        if record.decode_tokens:
            self._show(record.decode_tokens)

    def on_output(self, output: RequestOutput) -> None:
        """Count the first token, which comes from prefill, and expect of the open requests what this one needed."""
        self._observer.on_output(output)
        request = self._open.pop(output.request_id)
        self._add(request, -1)
        self._finished_tokens += len(output.token_ids)
        if not request.params.is_exact and output.finish_reason != "cancelled":
            self._early_tokens += len(output.token_ids)
            self._early_maximum += request.max_tokens
        self._show(1)

    def _add(self, request: Request, count: int) -> None:
        if request.params.is_exact:
            self._exact_tokens += count * request.max_tokens
        else:
            self._open_maximum += count * request.max_tokens

    def _expected(self) -> float | None:
        """Return the expected number of tokens of all requests, or None if nothing is known yet."""
        if self._open_maximum and not self._early_maximum:
            return None
        early = self._open_maximum and self._open_maximum * self._early_tokens / self._early_maximum
        return self._finished_tokens + self._exact_tokens + early

    def _show(self, tokens: int) -> None:
        made = int(self._bar.n) + tokens
        expected = self._expected()
        self._bar.total = None if expected is None else max(expected, made)
        finished = self._count - len(self._open)
        self._bar.set_postfix_str(f"{finished}/{self._count} requests, {made:,} tokens", refresh=False)
        self._bar.update(tokens)
