"""Sampling and stopping: the next token of each request, when a request has finished, and its final text.

Tokens are greedy, or drawn so that they depend only on the request's own seed. Every mode uses these rules.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from splitwiser.engine.logprobs import token_logprobs
from splitwiser.engine.messages import TokenLogprobs
from splitwiser.engine.penalties import PenalisedRequest, change_logits
from splitwiser.model.kernels.greedy import likeliest
from splitwiser.model.kernels.interface import LikeliestKernel
from splitwiser.request import FinishReason, SamplingParams

_MASK = (1 << 64) - 1

Decode = Callable[[Sequence[int]], str]  # token ids to text


class SampledRequest(PenalisedRequest, Protocol):
    """A request whose next token is sampled: its parameters, its tokens so far and its seed."""

    @property
    def seed(self) -> int:
        """Seed of its random numbers."""
        ...


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of each request of a step, in order; and its log-probabilities, None for a request that does not ask
    for them, or nothing at all if none does."""

    tokens: list[int]
    logprobs: Sequence[TokenLogprobs | None] = ()


def uniform(seed: int, position: int) -> float:
    """Return a random number in [0, 1) that depends only on ``seed`` and ``position`` (splitmix64, Steele et al. 2014).

    So no generator state is sent from prefill to decode, and other requests have no influence.
    """
    return (_mix(seed, position) >> 11) / (1 << 53)


def sample_seed(seed: int, sample: int) -> int:
    """Return the seed of a request that is number ``sample`` of the samples of a prompt whose first has ``seed``."""
    return _mix(seed, -1 - sample) if sample else seed


def _mix(seed: int, position: int) -> int:
    bits = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = ((bits ^ (bits >> shift)) * factor) & _MASK
    return bits ^ (bits >> 31)


def sample(
    logits: Tensor,
    requests: Sequence[SampledRequest],
    eos_token_ids: Collection[int],
    start_token_id: int | None,
    kernel: LikeliestKernel | None = None,
) -> Sampled:
    """Return the tokens of :func:`sample_tokens`, once the device has finished, with the log-probabilities that requests ask
    for, which are of ``logits`` as they are given."""
    tokens = sample_tokens(logits, requests, eos_token_ids, start_token_id, kernel)
    rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    if not rows:
        return Sampled(tokens.tolist())
    asked = torch.tensor(rows, device=logits.device)
    counts = [requests[row].params.logprobs or 0 for row in rows]
    logprobs: list[TokenLogprobs | None] = [None] * len(requests)
    for row, each in zip(rows, token_logprobs(logits[asked], tokens[asked], counts), strict=True):
        logprobs[row] = each
    return Sampled(tokens.tolist(), logprobs)


def sample_tokens(
    logits: Tensor,
    requests: Sequence[SampledRequest],
    eos_token_ids: Collection[int],
    start_token_id: int | None,
    kernel: LikeliestKernel | None = None,
) -> Tensor:
    """Return the next token of each request: int64 of shape (requests,), on the logits' device.

    ``logits`` has shape (requests, vocabulary); they are changed first where a request asks for it, by the model's
    ``eos_token_ids`` and ``start_token_id``. Greedy requests get the largest logit, found by ``kernel`` if there is one; for
    the others the cumulative distribution, in vocabulary order, is inverted at :func:`uniform` of their seed and position.
    """
    if any(request.params.changes_logits for request in requests):
        logits = change_logits(logits, requests, eos_token_ids, start_token_id)
    tokens = (kernel or likeliest)(logits)
    rows = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if rows:
        sampled = torch.tensor(rows, device=logits.device)
        tokens[sampled] = _sample(logits[sampled].float(), [requests[row] for row in rows])
    return tokens


def _sample(logits: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    params = [request.params for request in requests]
    vocabulary = logits.shape[-1]

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device).unsqueeze(-1)

    # shifted so that the largest is 0: no temperature, however small, overflows
    logits = (logits.double() - logits.amax(dim=-1, keepdim=True)) / column(
        [each.temperature for each in params], torch.float64
    )
    largest_k = max(each.top_k for each in params)
    if largest_k:
        ks = [min(each.top_k or vocabulary, vocabulary) for each in params]
        top = logits.topk(max(ks), dim=-1).values
        logits = logits.masked_fill(logits < top.gather(-1, column(ks, torch.long) - 1), float("-inf"))
    probabilities = logits.softmax(dim=-1, dtype=torch.float64)
    if any(each.top_p < 1 for each in params):
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens
        surplus = before >= column([each.top_p for each in params], torch.float64)
        probabilities = probabilities.masked_fill(torch.zeros_like(surplus).scatter(-1, order, surplus), 0.0)
    if any(each.min_p > 0 for each in params):
        least = column([each.min_p for each in params], torch.float64) * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    targets = column([uniform(request.seed, request.drawn) for request in requests], torch.float64) * cumulative[:, -1:]
    # the first token whose cumulative probability is above the target; this is never a token of probability 0
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp(max=vocabulary - 1)


def finish_reason(
    params: SamplingParams, token_ids: Sequence[int], eos_token_ids: Collection[int], decode: Decode
) -> FinishReason | None:
    """Return why a request with the output ``token_ids`` (at least one) has finished, or None if it has not."""
    last = token_ids[-1]
    if (last in eos_token_ids and not params.ignore_eos) or last in params.stop_token_ids:
        return "stop"
    if params.stop and _stop_places(params, token_ids, decode(token_ids), decode):
        return "stop"
    if params.max_tokens is not None and len(token_ids) >= params.max_tokens:
        return "length"
    return None


def final_text(params: SamplingParams, token_ids: Sequence[int], decode: Decode) -> str:
    """Return the text of ``token_ids``, cut before its first stop string, and without a stop token at its end."""
    if token_ids and token_ids[-1] in params.stop_token_ids:
        return decode(token_ids[:-1])
    text = decode(token_ids)
    places = _stop_places(params, token_ids, text, decode)
    return text[: min(places)] if places else text


def _stop_places(params: SamplingParams, token_ids: Sequence[int], text: str, decode: Decode) -> list[int]:
    """Return where stop strings begin in ``text``, that of ``token_ids``, those left out that end in its first
    ``min_tokens`` tokens."""
    held = len(decode(token_ids[: params.min_tokens])) if params.stop and params.min_tokens else 0
    places = (text.find(stop, max(0, held - len(stop) + 1)) for stop in params.stop)
    return [place for place in places if place >= 0]
