"""A request as its source knows it: before a model is loaded, and before its prompt is tokenised."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitwiser.request import PromptInput
from splitwiser.workload.reports import Report

_NO_REPORT = Report("")


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request of a workload. ``prompt`` is None if only its length is known: then it is ``prompt_tokens`` random token
    ids, drawn later, and exactly ``new_tokens`` are generated. Else ``new_tokens`` is the most that it generates. An
    encoder-decoder is given ``source`` instead, unless it is None.
    ``arrival_s`` counts from the start; ``report`` holds the text to summarise and its reference, for the results.
    ``sampling`` are its own sampling parameters by name, beside ``max_tokens``; the run's options give the others.
    ``adapter`` names the adapter that it runs with, ``none`` for the model alone, None for the run's default. ``priority``,
    ``ttft_target_ms`` and ``predicted_tokens`` are for policies, as a :class:`~splitwiser.request.Request` has them."""

    prompt: PromptInput | None
    prompt_tokens: int
    new_tokens: int
    arrival_s: float = 0.0
    report: Report = _NO_REPORT
    sampling: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    source: PromptInput | None = None
    priority: int = 0
    ttft_target_ms: float | None = None
    predicted_tokens: int | None = None

    def prompt_for(self, encodes: bool) -> PromptInput | None:
        """Return the prompt for an encoder-decoder or, if not ``encodes``, for a decoder."""
        return self.source if encodes and self.source is not None else self.prompt
