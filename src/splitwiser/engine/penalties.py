"""Changes that requests ask for in the logits before a token is chosen: biases, ends held back, and penalties for tokens
that were there before."""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from splitwiser.request import SamplingParams


class TokenCounts:
    """The distinct tokens of a request, its prompt's first, and how often each is in its output.

    Kept up with the output, so that a step costs no more than its new tokens. ``max_tokens`` is the most that the output
    can come to have.
    """

    def __init__(self, prompt_token_ids: Sequence[int], max_tokens: int) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_token_ids))}
        self._table = np.zeros((2, len(self._places) + max_tokens), dtype=np.int64)
        self._table[0, : len(self._places)] = list(self._places)
        self._counted = 0

    def after(self, token_ids: Sequence[int]) -> Tensor:
        """Return the tokens and their counts, int64 of shape (2, distinct tokens) on the CPU, once the output is
        ``token_ids``, which continue those of the last call."""
        for token in token_ids[self._counted :]:
            place = self._places.setdefault(token, len(self._places))
            self._table[0, place] = token
            self._table[1, place] += 1
        self._counted = len(token_ids)
        return torch.from_numpy(self._table[:, : len(self._places)])


class PenalisedRequest(Protocol):
    """A request whose logits may be changed: its parameters and its tokens so far."""

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters."""
        ...

    @property
    def drawn(self) -> int:
        """Number of output tokens so far."""
        ...

    def token_counts(self, start_token_id: int | None) -> Tensor:
        """Return its tokens so far, as :meth:`TokenCounts.after` does; ``start_token_id`` is the token that an
        encoder-decoder's answers begin with."""
        ...


def change_logits(
    logits: Tensor,
    requests: Sequence[PenalisedRequest],
    eos_token_ids: Collection[int],
    start_token_id: int | None,
) -> Tensor:
    """Return a float32 copy of ``logits``, of shape (requests, vocabulary), changed as the parameters of each request say
    (:class:`~splitwiser.request.SamplingParams`, which gives the order). ``eos_token_ids`` are the model's own, and
    ``start_token_id`` is the token that an encoder-decoder's answers begin with, which a decoder does not have."""
    logits = logits.to(torch.float32, copy=True)
    _add_biases(logits, requests)
    _hold_back_ends(logits, requests, eos_token_ids)
    _penalise(logits, requests, start_token_id)
    return logits


def _add_biases(logits: Tensor, requests: Sequence[PenalisedRequest]) -> None:
    entries = [
        (row, token, value)
        for row, each in enumerate(requests)
        for token, value in (each.params.logit_bias or {}).items()
    ]
    if entries:
        rows, tokens, values = zip(*entries, strict=True)
        places = torch.tensor([rows, tokens], device=logits.device)
        logits[places[0], places[1]] += torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _hold_back_ends(logits: Tensor, requests: Sequence[PenalisedRequest], eos_token_ids: Collection[int]) -> None:
    entries = [
        (row, token)
        for row, each in enumerate(requests)
        if each.drawn < each.params.min_tokens
        for token in (*each.params.stop_token_ids, *(() if each.params.ignore_eos else eos_token_ids))
        if 0 <= token < logits.shape[-1]  # some checkpoints name an end-of-sequence token that they do not have
    ]
    if entries:
        rows, tokens = torch.tensor(entries, device=logits.device).unbind(dim=-1)
        logits[rows, tokens] = float("-inf")


def _penalise(logits: Tensor, requests: Sequence[PenalisedRequest], start_token_id: int | None) -> None:
    penalised, penalties = [], []
    for row, each in enumerate(requests):
        own = (each.params.repetition_penalty, each.params.frequency_penalty, each.params.presence_penalty)
        if own != (1, 0, 0):
            penalised.append(row)
            penalties.append(own)
    if not penalised:
        return
    tables = [requests[row].token_counts(start_token_id) for row in penalised]
    lengths = torch.tensor([table.shape[-1] for table in tables])
    tokens, counts = torch.cat(tables, dim=-1).to(logits.device)
    rows = torch.tensor(penalised).repeat_interleave(lengths).to(logits.device)
    by_row = torch.tensor(penalties, dtype=logits.dtype).repeat_interleave(lengths, dim=0).to(logits.device)
    repetition, frequency, presence = by_row.unbind(dim=-1)
    scores = logits[rows, tokens]
    scores = torch.where(scores < 0, scores * repetition, scores / repetition)
    scores -= frequency * counts
    scores -= presence * (counts > 0)
    logits[rows, tokens] = scores  # each place once, since the tokens of a request are distinct
