"""One forward of a model over packed tokens, as prefill, decode and hybrid steps and CUDA graphs run it."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from splitwiser.model.attention import AttentionStep, serving
from splitwiser.model.direct import direct_decoder
from splitwiser.model.fixed_step import FixedStep
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import HybridAttention, PagedAttention, Segment


def prefill_logits(
    model: LoadedModel, pool: KVPool, segments: Sequence[Segment], token_ids: Sequence[int], rows: Sequence[int]
) -> Tensor:
    """Store K and V of ``token_ids``, the new tokens of ``segments`` one after another, and return the logits of ``rows``,
    shape (rows, vocabulary)."""
    positions = [position for segment in segments for position in segment.positions]
    return forward(model.module, PagedAttention(pool, segments, model.device), token_ids, positions, rows)


def decode_logits(model: LoadedModel, pool: KVPool, segments: Sequence[Segment], token_ids: Sequence[int]) -> Tensor:
    """Store K and V of ``token_ids``, the new tokens of ``segments`` one after another, and return the logits after the last
    of each: (requests, vocabulary)."""
    ends = [end - 1 for end in itertools.accumulate(segment.tokens for segment in segments)]
    return prefill_logits(model, pool, segments, token_ids, ends)


def hybrid_logits(
    model: LoadedModel,
    pool: KVPool,
    chunks: Sequence[Segment],
    prompt_tokens: Sequence[int],
    ends: Sequence[int],
    decoding: Sequence[Segment],
    last_tokens: Sequence[int],
) -> Tensor:
    """Store K and V of ``prompt_tokens``, the new tokens of ``chunks`` one after another, and of ``last_tokens``, those of
    ``decoding``. Returns the logits of those ``prompt_tokens`` whose numbers are ``ends`` and then those after the last
    token of each of ``decoding``: (ends and requests, vocabulary)."""
    positions = [position for segment in (*chunks, *decoding) for position in segment.positions]
    last = [len(prompt_tokens) + end - 1 for end in itertools.accumulate(segment.tokens for segment in decoding)]
    step = HybridAttention(pool, chunks, decoding, model.device)
    return forward(model.module, step, [*prompt_tokens, *last_tokens], positions, [*ends, *last])


def fixed_logits(model: LoadedModel, step: FixedStep) -> Tensor:
    """Return the logits of the rows of ``step``, (rows, vocabulary)."""
    return forward(model.module, step, step.tokens, step.positions, step.rows)


def forward(
    module: PreTrainedModel,
    step: AttentionStep,
    token_ids: Sequence[int] | Tensor,
    positions: Sequence[int] | Tensor,
    rows: Sequence[int] | Tensor,
) -> Tensor:
    """Run ``module`` over packed tokens, its attention through ``step``, and return the logits of ``rows``, shape
    (rows, vocabulary), in the model's dtype.

    ``token_ids``, ``positions`` and ``rows`` are numbers, or int64 tensors on the model's device of one dimension.
    """
    if direct := direct_decoder(module):
        ids, places, kept = (torch.as_tensor(each) for each in (token_ids, positions, rows))
        step.wanted_rows = kept
        with serving(step):
            return direct(ids[None], places[None], kept)
    device = module.device  # which takes long to ask for
    kept = torch.as_tensor(rows, device=device)
    keeps = takes_rows(module)
    step.wanted_rows = kept if keeps else None
    with on_device(device), serving(step):
        output = module(
            input_ids=torch.as_tensor(token_ids, device=device)[None],
            position_ids=torch.as_tensor(positions, device=device)[None],
            use_cache=True,
            **{cache_argument(module): step},
            **({"logits_to_keep": kept} if keeps else {}),
        )
    logits: Tensor = output.logits[0]
    return logits if keeps else logits[kept]


def takes_rows(module: PreTrainedModel) -> bool:
    """Return whether the forward of ``module`` can be told of which tokens it is to compute logits; else it does of all."""
    return "logits_to_keep" in _parameters(type(module).forward)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which the current device is ``device``, where Triton and cuBLAS launch."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def cache_argument(module: PreTrainedModel) -> str:
    """Return the argument of ``module`` that takes the cache, which transformers 5.24 renamed."""
    return "cache" if "cache" in _parameters(type(module).forward) else "past_key_values"


@cache
def _parameters(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
