"""Choosing tokens from logits: greedy, or drawn so that a request's draws depend on its own seed and nothing else."""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from splitwiser.request import FinishReason, SamplingParams

_MASK = (1 << 64) - 1

Decode = Callable[[Sequence[int]], str]


class Drawing(Protocol):
    """A request for which a token is due: its parameters, its seed and how many tokens it has already."""

    @property
    def params(self) -> SamplingParams:
        """How its tokens are chosen."""
        ...

    @property
    def seed(self) -> int:
        """What its draws depend on."""
        ...

    @property
    def drawn(self) -> int:
        """Tokens it has already."""
        ...


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on ``seed`` and ``position`` alone (splitmix64, Steele et al. 2014).

    No generator state has to travel with a request from prefill to decode, and no other request moves it.
    """
    bits = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = ((bits ^ (bits >> shift)) * factor) & _MASK
    return ((bits ^ (bits >> 31)) >> 11) / (1 << 53)


def choose(logits: Tensor, requests: Sequence[Drawing]) -> Tensor:
    """The next token of each request: int64, shape (requests,), on the logits' device.

    ``logits`` has shape (requests, vocabulary). Greedy requests take the largest logit; the others invert the
    cumulative distribution, in vocabulary order, at :func:`uniform` of their seed and position.
    """
    # PyTorch's argmax of half precisions takes five times as long on a CPU
    tokens = (logits if logits.is_cuda else logits.float()).argmax(dim=-1)
    rows = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if rows:
        picked = torch.tensor(rows, device=logits.device)
        tokens[picked] = _draw(logits[picked].float(), [requests[row] for row in rows])
    return tokens


def _draw(logits: Tensor, requests: Sequence[Drawing]) -> Tensor:
    params = [request.params for request in requests]
    vocabulary = logits.shape[-1]

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device).unsqueeze(-1)

    # the largest is 0, so that no temperature, however small, makes it infinite
    logits = (logits.double() - logits.amax(dim=-1, keepdim=True)) / column(
        [each.temperature for each in params], torch.float64
    )
    largest_k = max(each.top_k for each in params)
    if largest_k:
        ks = [min(each.top_k or vocabulary, vocabulary) for each in params]
        likeliest = logits.topk(max(ks), dim=-1).values
        logits = logits.masked_fill(logits < likeliest.gather(-1, column(ks, torch.long) - 1), float("-inf"))
    probabilities = logits.softmax(dim=-1, dtype=torch.float64)
    if any(each.top_p < 1 for each in params):
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # what the likelier ones make up already
        surplus = before >= column([each.top_p for each in params], torch.float64)
        probabilities = probabilities.masked_fill(torch.zeros_like(surplus).scatter(-1, order, surplus), 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    aims = column([uniform(request.seed, request.drawn) for request in requests], torch.float64) * cumulative[:, -1:]
    # the first token whose cumulative probability lies above the aim: one of probability 0 never does
    return torch.searchsorted(cumulative, aims, right=True).squeeze(-1).clamp(max=vocabulary - 1)


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
