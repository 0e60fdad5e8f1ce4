"""Log-probabilities of tokens under the model's own distribution, for the requests that ask for them."""

from collections.abc import Callable, Sequence

from torch import Tensor

from splitwiser.engine.messages import TokenLogprobs
from splitwiser.request import Logprob, TokenChoices

_ROWS_AT_ONCE = 256  # of a long prompt: a float32 copy of its logits would take gigabytes


def token_logprobs(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Return, for each row of ``logits`` (rows, vocabulary), the log-probability of its token of ``token_ids`` (rows,) and
    those of the ``counts`` likeliest tokens, computed in float32: the logarithm of the softmax, whatever changed the logits
    from which a token was chosen."""
    rows: list[TokenLogprobs] = []
    for start in range(0, len(counts), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        rows += _of_rows(logits[part], token_ids[part], counts[part])
    return rows


def _of_rows(logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(-1, token_ids[:, None])
    own_ranks = (logprobs > own).sum(dim=-1) + 1
    values, tokens = logprobs.topk(min(max(counts), logprobs.shape[-1]), dim=-1)
    ranks = (values[:, None] > values[:, :, None]).sum(dim=-1) + 1  # tokens as likely as each other have the same
    firsts = zip(token_ids.tolist(), own.squeeze(-1).tolist(), own_ranks.tolist(), strict=True)
    likeliest = zip(tokens.tolist(), values.tolist(), ranks.tolist(), strict=True)
    return [
        (first, *(each for each in zip(*(column[:count] for column in columns), strict=True) if each[0] != first[0]))
        for first, columns, count in zip(firsts, likeliest, counts, strict=True)
    ]


def with_text(logprobs: Sequence[TokenLogprobs], decode: Callable[[Sequence[int]], str]) -> list[TokenChoices]:
    """Return ``logprobs`` as outputs have them, each token with its own text by ``decode``."""
    return [{token: Logprob(value, rank, decode((token,))) for token, value, rank in each} for each in logprobs]
