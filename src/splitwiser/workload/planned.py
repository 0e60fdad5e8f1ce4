"""A request as its source knows it: before a model is loaded, and before its prompt is tokenised."""

from dataclasses import dataclass

from splitwiser.request import Prompt
from splitwiser.workload.reports import Report

_NO_REPORT = Report("")


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request of a workload. ``prompt`` is None if only its length is known: then it is ``prompt_tokens`` random token
    ids, drawn later, and exactly ``new_tokens`` are generated. Else ``new_tokens`` is the most that it generates. An
    encoder-decoder is given ``source`` instead, unless it is None.
    ``arrival_s`` counts from the start; ``report`` holds the text to summarise and its reference, for the results."""

    prompt: Prompt | None
    prompt_tokens: int
    new_tokens: int
    arrival_s: float = 0.0
    report: Report = _NO_REPORT
    source: Prompt | None = None

    def prompt_for(self, encodes: bool) -> Prompt | None:
        """Return the prompt for an encoder-decoder or, if not ``encodes``, for a decoder."""
        return self.source if encodes and self.source is not None else self.prompt
