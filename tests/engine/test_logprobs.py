"""Log-probabilities of tokens, against log_softmax, and of prompts in steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splitwiser.engine.logprobs import token_logprobs
from splitwiser.engine.steps import Chunk, SequenceState, prefill_step
from splitwiser.model.compatibility import attach_engine
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import load_model
from splitwiser.request import Request, SamplingParams
from tests.support.tokens import prompts_of, reference_model


def test_a_token_has_its_log_softmax_and_rank() -> None:
    logits = torch.randn(300, 11, generator=torch.Generator().manual_seed(0))  # more rows than are computed at once
    tokens = torch.arange(300) % 11
    expected = logits.log_softmax(-1)
    for row, (token, value, rank) in enumerate(each[0] for each in token_logprobs(logits, tokens, [0] * 300)):
        assert token == row % 11
        assert value == pytest.approx(expected[row, token].item())
        assert rank == sorted(expected[row].tolist(), reverse=True).index(expected[row, token].item()) + 1


def test_the_likeliest_follow_each_as_many_as_asked() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]] * 3)
    made = token_logprobs(logits, torch.tensor([0, 1, 1]), [2, 1, 3])
    assert [[(token, rank) for token, _, rank in row] for row in made] == [
        [(0, 4), (1, 1), (3, 2)],
        [(1, 1)],  # the token itself is not repeated
        [(1, 1), (3, 2), (2, 3)],
    ]


def test_equally_likely_tokens_share_a_rank() -> None:
    (row,) = token_logprobs(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), torch.tensor([2]), [4])
    assert sorted((token, rank) for token, _, rank in row) == [(0, 3), (1, 1), (2, 1), (3, 4)]


def test_more_than_the_vocabulary_are_all_tokens() -> None:
    (row,) = token_logprobs(torch.zeros(1, 3), torch.tensor([0]), [20])
    assert len(row) == 3


@pytest.mark.parametrize("budget", [1, 7, 100])
def test_a_prompts_tokens_have_theirs_however_it_is_split(budget: int, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("llama"), dtype="float32", device="cpu", load_format="auto")
    pool = KVPool(attach_engine(model), 64, 4, model.dtype, model.device)
    asks, plain = (
        SequenceState(Request(number, tuple(prompt), params, seed=0), range(number * 8, number * 8 + 8))
        for number, (prompt, params) in enumerate(
            zip(prompts_of([23, 5]), [SamplingParams(prompt_logprobs=0), SamplingParams(logprobs=0)], strict=True)
        )
    )
    length = len(asks.request.prompt_token_ids)
    for start in range(0, length, budget):
        last = Chunk(asks, start, min(budget, length - start))
        sampled = prefill_step(model, pool, [Chunk(plain, 0, 5), last])
    assert sampled.logprobs[0] is not None
    assert sampled.logprobs[1] is None  # which asked for its prompt's alone
    ids = torch.tensor([asks.request.prompt_token_ids])
    with torch.no_grad():
        expected = reference_model(tiny("llama"))(ids).logits[0].log_softmax(-1)
    assert [each[0][0] for each in asks.prompt_logprobs] == ids[0, 1:].tolist()
    assert [each[0][1] for each in asks.prompt_logprobs] == pytest.approx(
        expected[:-1].gather(-1, ids[0, 1:, None])[:, 0].tolist(), abs=1e-4
    )
    assert plain.prompt_logprobs == []
