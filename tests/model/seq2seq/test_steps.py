"""The attention of an encoder over packed sources."""

import pytest
import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from splitwiser.errors import UnsupportedModelError
from splitwiser.model.attention import AttentionOptions, Mask
from splitwiser.model.seq2seq import steps
from splitwiser.model.seq2seq.steps import EncoderStep

LENGTHS = [3, 1, 20]
HEADS, KV_HEADS, SIZE, FARTHEST = 4, 2, 8, 5
BOTH_WAYS = Mask(bidirectional_mask_function)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, sum(LENGTHS), SIZE, generator=random) for n in (HEADS, KV_HEADS, KV_HEADS))
    return query, key, value


def expected(bias: torch.Tensor | None) -> torch.Tensor:
    """All pairs of all sources in one product, with those of two sources masked."""
    query, key, value = (each.double() for each in inputs())
    key, value = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (key, value))
    at = torch.cat([torch.arange(length) for length in LENGTHS])
    owner = torch.repeat_interleave(torch.tensor(LENGTHS))
    scores = query @ key.transpose(2, 3) * 0.5
    if bias is not None:
        scores = scores + bias.double()[:, (at[None] - at[:, None]).clamp(-FARTHEST, FARTHEST) + FARTHEST]
    scores = scores.masked_fill(owner[None] != owner[:, None], float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("at_once", [2**24, 200])  # one part for each source, and several for the long one
@pytest.mark.parametrize("with_bias", [False, True])
def test_each_token_sees_its_own_source(with_bias: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_SCORES_AT_ONCE", at_once)
    bias = torch.randn(HEADS, 2 * FARTHEST + 1, generator=torch.Generator().manual_seed(1)) if with_bias else None
    step = EncoderStep(LENGTHS, torch.device("cpu"))
    for _ in range(2):  # the second layer uses the biases again
        made = step.attend(*inputs(), BOTH_WAYS, AttentionOptions(0.5, bias=bias))
        torch.testing.assert_close(made.double(), expected(bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "options", "reason"),
    [
        (Mask(causal_mask_function), AttentionOptions(0.5), "does not see the whole source"),
        (None, AttentionOptions(0.5), "does not see the whole source"),
        (BOTH_WAYS, AttentionOptions(0.5, softcap=5.0), "with a soft-cap or sinks"),
        (BOTH_WAYS, AttentionOptions(0.5, sinks=torch.zeros(HEADS)), "with a soft-cap or sinks"),
    ],
)
def test_another_attention_is_refused(mask: object, options: AttentionOptions, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        EncoderStep(LENGTHS, torch.device("cpu")).attend(*inputs(), mask, options)
