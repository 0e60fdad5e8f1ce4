"""Attention written out token by token in float64 against what the engine computes over the pool."""

import math
import shutil
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from splitwiser.model.attention import AttentionOptions, Mask
from splitwiser.model.kernels.choose import load_kernels
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.paged_attention import HybridAttention, PagedAttention, Segment

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK = 6, 2, 8, 5, 4


def written_out(
    query: Tensor, keys: Tensor, values: Tensor, context: int, mask: Mask, options: AttentionOptions
) -> Tensor:
    """Attention of the last ``len(query)`` of ``context`` tokens; all of shape (tokens, heads, dim)."""
    output = torch.zeros(len(query), HEADS, values.shape[2], dtype=torch.float64)
    for row in range(len(query)):
        position = context - len(query) + row
        seen = [key for key in range(context) if bool(mask(torch.tensor(position), torch.tensor(key)))]
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            scores = [float(query[row, head].double() @ keys[key, kv_head].double()) * options.scaling for key in seen]
            if options.softcap is not None:
                scores = [options.softcap * math.tanh(score / options.softcap) for score in scores]
            if options.bias is not None:
                entries = [key if options.bias_by_position else position - key for key in seen]
                table = options.bias[head].tolist()
                biases = [table[min(entry, len(table) - 1)] for entry in entries]
                scores = [score + bias for score, bias in zip(scores, biases, strict=True)]
            sink = [] if options.sinks is None else [float(options.sinks[head])]
            weights = torch.tensor(scores + sink, dtype=torch.float64).softmax(0)
            for weight, key in zip(weights, seen, strict=False):
                output[row, head] += weight * values[key, kv_head].double()
    return output


BIAS = torch.linspace(-3, 2, HEADS * 7).cos().view(HEADS, 7).contiguous()  # fewer entries than the longest context
OPTIONS = {
    "plain": AttentionOptions(0.35),
    "softcap": AttentionOptions(0.35, softcap=0.8),
    "sinks": AttentionOptions(0.35, sinks=torch.linspace(-1, 2, HEADS)),
    "bias by distance": AttentionOptions(0.35, bias=BIAS),
    "bias by position": AttentionOptions(0.35, bias=BIAS, bias_by_position=True),
    "bias and softcap": AttentionOptions(0.35, softcap=0.8, bias=BIAS),
}


def every_other(_: int, __: int, queries: Tensor, keys: Tensor) -> Tensor:
    """A causal mask with holes, which no range of positions describes."""
    return (keys <= queries) & ((queries - keys) % 2 == 0)


MASKS = {
    "causal": Mask(causal_mask_function),
    "window": Mask(sliding_window_causal_mask_function(3)),
    "holes": Mask(every_other),
}


KERNELS = {
    "compiled": pytest.param(
        "auto", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
    ),
    "plain": pytest.param("plain"),
    "varlen": pytest.param("varlen"),
}


def attend_by_request(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    window: int | None,
    scaling: float,
) -> Tensor:
    """What :class:`splitwiser.model.kernels.interface.VarlenKernel` asks for, a request at a time."""
    output = query.new_empty(len(query), HEADS, values.shape[2])
    spans = list(zip(*(pairwise(each.tolist()) for each in offsets), strict=True))
    assert longest == (max(end - begin for (begin, end), _ in spans), max(end - begin for _, (begin, end) in spans))
    for (begin, end), (first, last) in spans:
        near = sliding_window_causal_mask_function(window or last - first)
        rows = query[begin:end]
        made = written_out(
            rows, keys[first:last], values[first:last], last - first, Mask(near), AttentionOptions(scaling)
        )
        output[begin:end] = made.to(query.dtype)
    return output


def pool_of(value_dim: int, blocks: int, dtype: torch.dtype, kernels: str) -> KVPool:
    cpu = torch.device("cpu")
    layers = [LayerShape(KV_HEADS, KEY_DIM, value_dim)]
    if kernels == "varlen":
        return KVPool(layers, blocks, BLOCK, dtype, cpu, kernels=PoolKernels(varlen=attend_by_request))
    return KVPool(layers, blocks, BLOCK, dtype, cpu, kernels=load_kernels(kernels, cpu, dtype, layers)[0])


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([(7, 7), (1, 1), (12, 12)], id="whole prompts"),
        pytest.param([(9, 4), (13, 1), (5, 5)], id="the rest of a prompt"),
        pytest.param([(9, 1), (2, 1), (30, 1), (4, 1), (5, 1), (8, 1)], id="decode"),
    ],
)
def test_attends_as_written_out(parts: list[tuple[int, int]], mask: str, option: str, kernels: str) -> None:
    generator = torch.Generator().manual_seed(len(parts))
    pool = pool_of(VALUE_DIM, 40, torch.float32, kernels)
    free = torch.randperm(40, generator=generator).tolist()
    segments, expected, queries, new_keys, new_values = [], [], [], [], []
    for context, tokens in parts:
        blocks = [free.pop() for _ in range(pool.blocks_for(context) + 1)]
        keys = torch.randn(context, KV_HEADS, KEY_DIM, generator=generator)
        values = torch.randn(context, KV_HEADS, VALUE_DIM, generator=generator)
        query = torch.randn(tokens, HEADS, KEY_DIM, generator=generator)
        slots = torch.tensor(
            [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(context - tokens)], dtype=torch.long
        )
        pool.write(0, slots, keys[: context - tokens], values[: context - tokens])
        segments.append(Segment(blocks, context, tokens))
        queries.append(query)
        new_keys.append(keys[context - tokens :])
        new_values.append(values[context - tokens :])
        expected.append(written_out(query, keys, values, context, MASKS[mask], OPTIONS[option]))

    step = PagedAttention(pool, segments, torch.device("cpu"))
    query, key, value = (torch.cat(each).transpose(0, 1)[None] for each in (queries, new_keys, new_values))
    key, value = step.update(key, value, layer_idx=0)
    output = step.attend(query, key, value, MASKS[mask], OPTIONS[option])

    assert output.shape == (1, sum(tokens for _, tokens in parts), HEADS, VALUE_DIM)
    torch.testing.assert_close(output[0].double(), torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decode_is_close_to_float32(dtype: torch.dtype, kernels: str) -> None:
    outputs = []
    for kind in (torch.float32, dtype):
        generator = torch.Generator().manual_seed(3)
        pool = pool_of(KEY_DIM, 8, kind, kernels)
        kept = torch.randn(32, KV_HEADS, KEY_DIM, generator=generator).to(kind)
        pool.write(0, torch.arange(32), kept, kept)
        step = PagedAttention(pool, [Segment(range(8), 31, 1), Segment([5, 2], 7, 1)], torch.device("cpu"))
        query = torch.randn(1, HEADS, 2, KEY_DIM, generator=generator).to(kind)
        new = torch.randn(1, KV_HEADS, 2, KEY_DIM, generator=generator).to(kind)
        step.update(new, new, 0)
        outputs.append(step.attend(query, new, new, MASKS["causal"], OPTIONS["plain"]).float())
    torch.testing.assert_close(outputs[1], outputs[0], atol=0.03, rtol=0.03)


class Called:
    """A variable-length kernel that records its calls."""

    def __init__(self) -> None:
        self.windows: list[int | None] = []

    def __call__(self, *given: Any, **_: Any) -> Tensor:
        query, _keys, values, _offsets, _longest, window, _scaling = given
        self.windows.append(window)
        return torch.zeros(*query.shape[:2], values.shape[2])


def chunks_of_four(_: int, __: int, queries: Tensor, keys: Tensor) -> Tensor:
    """As Llama 4's chunked layers see: from the own chunk's first position on."""
    return (keys <= queries) & (keys // 4 == queries // 4)


@pytest.mark.parametrize(
    ("mask", "option", "windows"),
    [
        (MASKS["causal"], "plain", [None]),
        (MASKS["window"], "plain", [3]),
        (MASKS["holes"], "plain", []),
        (Mask(chunks_of_four), "plain", []),
        (MASKS["causal"], "softcap", []),
        (MASKS["causal"], "sinks", []),
        (MASKS["causal"], "bias by distance", []),
    ],
    ids=["causal", "window", "holes", "chunks", "softcap", "sinks", "bias"],
)
def test_all_prompts_go_to_one_call_that_knows_what_is_asked(
    mask: Mask, option: str, windows: list[int | None]
) -> None:
    cpu, called = torch.device("cpu"), Called()
    layers = [LayerShape(KV_HEADS, KEY_DIM, KEY_DIM)]
    pool = KVPool(layers, 12, BLOCK, torch.float32, cpu, kernels=PoolKernels(varlen=called))
    step = PagedAttention(pool, [Segment(range(4), 14, 14), Segment(range(4, 8), 9, 5)], cpu)
    query, new = torch.randn(1, HEADS, 19, KEY_DIM), torch.randn(1, KV_HEADS, 19, KEY_DIM)
    step.update(new, new, 0)
    step.attend(query, new, new, mask, OPTIONS[option])
    assert called.windows == windows


class Recorded:
    """The compiled kernel, or zeros, with the number of tokens and of requests of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, *_: Any, **__: Any) -> Tensor:
        self.calls.append((len(query), len(tables)))
        return torch.full((len(query), HEADS, values.shape[3]), float(len(self.calls)))


def test_a_hybrid_step_decodes_by_the_decode_kernel_and_prefills_by_the_other() -> None:
    cpu, decode, prefill = torch.device("cpu"), Recorded(), Recorded()
    kernels = PoolKernels(decode=decode, prefill=prefill)
    pool = KVPool([LayerShape(KV_HEADS, KEY_DIM, KEY_DIM)], 20, BLOCK, torch.float32, cpu, kernels=kernels)
    chunks = [Segment(range(4), 14, 14), Segment(range(4, 8), 9, 5)]
    decoding = [Segment(range(8 + n, 20, 4), 3 + n, 1) for n in range(4)]
    step = HybridAttention(pool, chunks, decoding, cpu)
    query, new = torch.randn(1, HEADS, 23, KEY_DIM), torch.randn(1, KV_HEADS, 23, KEY_DIM)
    step.update(new, new, 0)
    output = step.attend(query, new, new, MASKS["causal"], OPTIONS["plain"])
    assert (prefill.calls, decode.calls) == ([(19, 2)], [(4, 4)])
    assert output.shape == (1, 23, HEADS, KEY_DIM)
    assert step.kernel_inputs([0], MASKS["causal"]) is None  # whole layers in one call is for decode steps


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("chunks", [[(7, 7), (9, 4)], [(9, 1)]], ids=["parts", "one token"])
def test_a_hybrid_step_attends_as_its_parts_do(chunks: list[tuple[int, int]], option: str, kernels: str) -> None:
    sizes = [*chunks, (2, 1), (30, 1), (5, 1)]
    pool = pool_of(VALUE_DIM, 40, torch.float32, kernels)
    cpu, new_tokens = torch.device("cpu"), sum(tokens for _, tokens in sizes)
    pool.write(0, torch.arange(160), torch.randn(160, KV_HEADS, KEY_DIM), torch.randn(160, KV_HEADS, VALUE_DIM))
    free = iter(range(40))
    segments = [Segment([next(free) for _ in range(8)], context, tokens) for context, tokens in sizes]
    query, key = torch.randn(1, HEADS, new_tokens, KEY_DIM), torch.randn(1, KV_HEADS, new_tokens, KEY_DIM)
    value = torch.randn(1, KV_HEADS, new_tokens, VALUE_DIM)
    made = []
    for step in (
        HybridAttention(pool, segments[: len(chunks)], segments[len(chunks) :], cpu),
        PagedAttention(pool, segments, cpu),
    ):
        step.update(key, value, 0)
        made.append(step.attend(query, key, value, MASKS["window"], OPTIONS[option]))
    torch.testing.assert_close(made[0], made[1], atol=1e-5, rtol=1e-5)
