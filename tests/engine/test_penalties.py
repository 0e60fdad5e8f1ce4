"""Logits changed as requests ask, against the rules written out token by token."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from splitwiser.engine.penalties import TokenCounts, change_logits
from splitwiser.request import SamplingParams

EOS = (1, 2, 99)  # the last is beyond the vocabulary, as some checkpoints' is
VOCABULARY = 12


@dataclass(frozen=True)
class Running:
    params: SamplingParams
    prompt: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def drawn(self) -> int:
        return len(self.output)

    def token_counts(self, _: int | None) -> Tensor:
        return TokenCounts(self.prompt, 16).after(self.output)


def changed(logits: list[float], request: Running) -> list[float]:
    """The rules of :class:`SamplingParams`, one token after another."""
    params, counts = request.params, Counter(request.output)
    made = []
    for token, given in enumerate(logits):
        score = given + (params.logit_bias or {}).get(token, 0)
        ends = token in params.stop_token_ids or (token in EOS and not params.ignore_eos)
        if ends and request.drawn < params.min_tokens:
            score = float("-inf")
        if token in request.prompt + request.output:
            score = score * params.repetition_penalty if score < 0 else score / params.repetition_penalty
        score -= params.frequency_penalty * counts[token] + params.presence_penalty * (token in counts)
        made.append(score)
    return made


def running(prompt: tuple[int, ...] = (5, 1, 5, 3), output: tuple[int, ...] = (7, 3, 7, 7), **settings: Any) -> Running:
    return Running(SamplingParams(**settings), prompt, output)


REQUESTS = {
    "nothing": running(),
    "repetition": running(repetition_penalty=1.5),
    "repetition wanted": running(repetition_penalty=0.5),
    "presence": running(presence_penalty=1.25),
    "frequency": running(frequency_penalty=-0.75),
    "bias": running(logit_bias={0: 100, 11: -2.5}),
    "ends held back": running(min_tokens=5, stop_token_ids=[4]),
    "ends no longer held back": running(min_tokens=4, stop_token_ids=[4]),
    "own ends alone held back": running(min_tokens=5, stop_token_ids=[4], ignore_eos=True),
    "first token": running(output=(), repetition_penalty=2, presence_penalty=2, frequency_penalty=2, min_tokens=1),
    "all at once": running(
        repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 3, 1: 9}, min_tokens=9,
        stop_token_ids=[7],
    ),
}  # fmt: skip


def logits_of(rows: int) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(rows)) * 4


@pytest.mark.parametrize("name", REQUESTS)
def test_changes_are_the_written_out_ones(name: str) -> None:
    logits = logits_of(1)
    made = change_logits(logits, [REQUESTS[name]], EOS, None)
    torch.testing.assert_close(made, torch.tensor([changed(logits[0].tolist(), REQUESTS[name])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_changes_each_row_as_alone_and_leaves_the_logits(dtype: torch.dtype) -> None:
    requests = list(REQUESTS.values())
    logits = logits_of(len(requests)).to(dtype)
    before = logits.clone()
    made = change_logits(logits, requests, EOS, None)
    alone = [change_logits(logits[row : row + 1], [each], EOS, None) for row, each in enumerate(requests)]
    assert made.dtype == torch.float32
    assert torch.equal(made, torch.cat(alone))
    assert torch.equal(logits, before)


def test_counts_follow_the_output() -> None:
    prompt, output = (3, 9, 3, 0), [9, 4, 9, 0, 4, 6]
    counts = TokenCounts(prompt, len(output))
    for made in (0, 1, 4, 6):
        tokens, times = counts.after(output[:made]).tolist()
        assert len(set(tokens)) == len(tokens)
        assert dict(zip(tokens, times, strict=True)) == {token: output[:made].count(token) for token in tokens}
        assert set(tokens) == {*prompt, *output[:made]}
