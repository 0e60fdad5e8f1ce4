"""When a request has finished, and what text it leaves; one rule for every mode."""

from collections.abc import Callable, Collection, Sequence

from splitwiser.request import FinishReason, SamplingParams

Decode = Callable[[Sequence[int]], str]


def finish_reason(
    params: SamplingParams, token_ids: Sequence[int], eos_token_ids: Collection[int], decode: Decode
) -> FinishReason | None:
    """Why a request with these output ``token_ids`` (at least one) has finished, or None while it has not."""
    if token_ids[-1] in eos_token_ids and not params.ignore_eos:
        return "stop"
    if params.stop and any(stop in decode(token_ids) for stop in params.stop):
        return "stop"
    return "length" if len(token_ids) >= params.max_tokens else None


def final_text(params: SamplingParams, token_ids: Sequence[int], decode: Decode) -> str:
    """The text of ``token_ids``, cut before the first stop string in it."""
    text = decode(token_ids)
    cuts = [place for place in map(text.find, params.stop) if place >= 0]
    return text[: min(cuts)] if cuts else text
