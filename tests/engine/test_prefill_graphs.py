"""Prefill steps of fixed sizes compute what steps of any size do and touch nothing else; their capture needs a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

from splitwiser.engine.prefill_graphs import (
    MAX_PROMPTS,
    PrefillGraphs,
    _FixedPrompts,
    capture_prefill_graphs,
    prefill_sizes,
)
from splitwiser.engine.steps import Chunk, SequenceState, prefill_step
from splitwiser.errors import UnsupportedModelError
from splitwiser.model import attention
from splitwiser.model.adapters.files import find_adapters
from splitwiser.model.adapters.serving import attach_adapters
from splitwiser.model.attention import AttentionOptions, Mask
from splitwiser.model.checkpoints.catalog import CatalogEntry
from splitwiser.model.compatibility import attach_engine
from splitwiser.model.forward import forward
from splitwiser.model.kernels.choose import load_kernels
from splitwiser.model.kernels.interface import PoolKernels
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.model.paged_attention import PagedAttention, Segment
from splitwiser.model.trials import logits_agree
from splitwiser.request import Adapter, Request, SamplingParams
from tests.support.models import make_tiny
from tests.support.tokens import prompts_of

BLOCK, BLOCKS, BUDGET = 16, 64, 200
LENGTHS = [[7], [40, 1, 13], [100, 60], [3] * 16, [64, 64, 64]]  # prompts of each step


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [
        (24, [24]),
        (512, [128, 192, 256, 320, 384, 448, 512]),
        (2048, [128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048]),
        (10**6, [128, 256, 512, 1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192]),
    ],
)
def test_at_most_an_eighth_of_the_largest_step_is_padding(budget: int, sizes: list[int]) -> None:
    assert prefill_sizes(budget) == sizes


def attend_by_request(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    window: int | None,
    scaling: float,
) -> Tensor:
    """What :class:`splitwiser.model.kernels.interface.VarlenKernel` asks for, in PyTorch."""
    output = torch.full((len(query), query.shape[1], values.shape[2]), float("nan"))
    for (begin, end), (first, last) in zip(*(pairwise(each.tolist()) for each in offsets), strict=True):
        assert end - begin <= longest[0]
        positions = torch.arange(last - first)
        near = sliding_window_causal_mask_function(window or last - first + 1)
        seen = near(0, 0, positions[len(positions) - (end - begin) :, None], positions[None])
        parts = (query[begin:end], keys[first:last], values[first:last])
        queries, some_keys, some_values = (each.transpose(0, 1)[None] for each in parts)
        made = attention.attend(queries, some_keys, some_values, seen, AttentionOptions(scaling))
        output[begin:end] = made[0].transpose(0, 1)
    return output


def loaded(directory: Path) -> tuple[LoadedModel, KVPool]:
    model = load_model(directory, dtype="float32", device="cpu", load_format="auto")
    layers = attach_engine(model)
    kernels = PoolKernels(varlen=attend_by_request)
    return model, KVPool(layers, BLOCKS, BLOCK, model.dtype, model.device, kernels=kernels)


def sequences_of(lengths: Sequence[int], new_tokens: int = 4) -> list[SequenceState]:
    """Prompts of these lengths, with blocks from the pool's end, so that no table is in order."""
    free = list(range(BLOCKS))
    return [
        SequenceState(
            Request(number, tuple(prompt), SamplingParams(max_tokens=new_tokens), 0),
            [free.pop() for _ in range(-(-(len(prompt) + new_tokens) // BLOCK))],
        )
        for number, prompt in enumerate(prompts_of(lengths))
    ]


def whole(sequences: Sequence[SequenceState]) -> list[Chunk]:
    return [Chunk(each, 0, len(each.request.prompt_token_ids)) for each in sequences]


def test_fixed_steps_add_each_requests_own_adapter(tiny: Callable[[str], Path]) -> None:
    from tests.support.adapters import make_adapter  # skips without peft

    directory = tiny("llama")
    model = load_model(directory, dtype="float32", device="cpu", load_format="auto")
    given = {name: make_adapter(name, directory) for name in ("lora", "rslora")}
    attach_adapters(model, list(find_adapters(given, CatalogEntry("tiny")).values()), merge=False)
    layers, kernels = attach_engine(model), PoolKernels(varlen=attend_by_request)
    pool = KVPool(layers, BLOCKS, BLOCK, model.dtype, model.device, kernels=kernels)
    without = prefill_step(model, pool, whole(sequences_of([40, 1, 13]))).tokens
    sequences = sequences_of([40, 1, 13])
    for sequence, number in zip(sequences, (2, 0, 1), strict=True):
        sequence.request = replace(sequence.request, adapter=Adapter("any", lora=number))
    expected = prefill_step(model, pool, whole(sequences)).tokens
    assert prefill_step(model, pool, whole(sequences), PrefillGraphs(model, pool, BUDGET)).tokens == expected
    assert [one == other for one, other in zip(expected, without, strict=True)] == [False, True, False]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", ["opt", "llama", "mistral"])
def test_fixed_steps_compute_the_same(name: str, lengths: list[int], tiny: Callable[[str], Path]) -> None:
    model, pool = loaded(tiny(name))
    sequences = sequences_of(lengths)
    expected = prefill_step(model, pool, whole(sequences)).tokens
    stored = [layer.clone() for layer in (*pool.keys, *pool.values)]
    for layer in (*pool.keys, *pool.values):
        layer.zero_()
    graphs = PrefillGraphs(model, pool, BUDGET)
    assert prefill_step(model, pool, whole(sequences), graphs).tokens == expected
    prompts = torch.zeros(BLOCKS * BLOCK, dtype=torch.bool)
    after = prompts.clone()  # the slots after a prompt's last token, of which one takes what is not asked for
    for sequence in sequences:
        slots = (torch.tensor(sequence.blocks)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        prompts[slots[: len(sequence.request.prompt_token_ids)]] = True
        after[slots[len(sequence.request.prompt_token_ids)]] = True
    for made, wanted in zip((*pool.keys, *pool.values), stored, strict=True):
        torch.testing.assert_close(made.flatten(0, 1)[prompts], wanted.flatten(0, 1)[prompts])
        assert not made.flatten(0, 1)[~prompts & ~after].any()
        assert made.isfinite().all()  # a masked slot has to hold finite numbers


def test_steps_that_no_fixed_one_takes(tiny: Callable[[str], Path]) -> None:
    model, pool = loaded(tiny("llama"))
    graphs = PrefillGraphs(model, pool, BUDGET)
    taken = Segment((0, 1), 20, 20)
    assert graphs.logits([taken], [5] * 20, [19]) is not None
    assert graphs.logits([Segment((0, 1), 20, 8)], [5] * 8, [7]) is None  # an earlier step began this prompt
    assert graphs.logits([taken] * 11, [5] * 220, [19]) is None  # more than the largest step
    many = [Segment((number,), 2, 2) for number in range(MAX_PROMPTS + 1)]
    assert graphs.logits(many, [5] * 2 * len(many), [1]) is None
    full = Segment((0, 1), 32, 32)  # what is not asked for would have no slot
    assert graphs.logits([full], [5] * 32, [31]) is None
    assert graphs.logits([full, Segment((2,), 3, 3)], [5] * 35, [31, 34]) is not None


def test_a_step_falls_back_where_no_fixed_one_takes_it(tiny: Callable[[str], Path]) -> None:
    model, pool = loaded(tiny("opt"))
    (sequence,) = sequences_of([40])
    expected = prefill_step(model, pool, whole([sequence])).tokens
    graphs = PrefillGraphs(model, pool, BUDGET)
    assert prefill_step(model, pool, [Chunk(sequence, 0, 24)], graphs).tokens == []
    assert prefill_step(model, pool, [Chunk(sequence, 24, 16)], graphs).tokens == expected


def test_each_token_knows_the_length_of_its_prompt(tiny: Callable[[str], Path]) -> None:
    _, pool = loaded(tiny("opt"))
    step = _FixedPrompts(pool, 32, torch.device("cpu"))
    step.load([Segment(range(1), 5, 5), Segment(range(1, 2), 11, 11)], [0] * 16, [4, 15])
    assert step.lengths(step.positions[None])[0].tolist() == [5] * 5 + [11] * 11 + [16] * 16


def test_attention_that_the_kernel_does_not_take_is_refused(tiny: Callable[[str], Path]) -> None:
    _, pool = loaded(tiny("opt"))
    step = _FixedPrompts(pool, 32, torch.device("cpu"))
    made = torch.zeros(1, 4, 32, 12)
    with pytest.raises(UnsupportedModelError, match="options"):
        step.attend(made, made, made, Mask(sliding_window_causal_mask_function(3)), AttentionOptions(1.0, softcap=2.0))
    chunks = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    step.update(made, made, 0)
    with pytest.raises(UnsupportedModelError, match="no sliding window"):
        step.attend(made, made, made, Mask(chunks), AttentionOptions(1.0))


def test_graphs_that_compute_something_else_do_not_serve(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pool = loaded(tiny("llama"))
    assert PrefillGraphs(model, pool, BUDGET).find_difference(pool) is None
    attend = _FixedPrompts.attend
    monkeypatch.setattr(_FixedPrompts, "attend", lambda *arguments: 0.5 * attend(*arguments))
    found = PrefillGraphs(model, pool, BUDGET).find_difference(pool)
    assert found == "the logits of a step of 150 tokens differ from those without graphs"


def test_without_a_gpu_nothing_is_captured(tiny: Callable[[str], Path]) -> None:
    model, pool = loaded(tiny("opt"))
    assert capture_prefill_graphs(model, pool, BUDGET) == (None, "none (CUDA graphs need a GPU)")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_replayed_graphs_compute_the_same(name: str, tmp_path: Path) -> None:
    checkpoint = make_tiny(name, tmp_path / name, head_dim=16)  # the kernel takes multiples of 8
    model = load_model(checkpoint, dtype="bfloat16", device="cuda", load_format="auto")
    layers = attach_engine(model)
    kernels, described = load_kernels("auto", model.device, model.dtype, layers)
    assert kernels.varlen is not None, described
    pool = KVPool(layers, BLOCKS, BLOCK, model.dtype, model.device, kernels=kernels)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    graphs, told = capture_prefill_graphs(model, pool, BUDGET, streams)
    assert graphs is not None, told
    for stream in streams:
        with torch.cuda.stream(stream), torch.inference_mode():
            for lengths in LENGTHS:
                segments = [
                    Segment(each.blocks, length, length)
                    for each, length in zip(sequences_of(lengths), lengths, strict=True)
                ]
                tokens = [token for prompt in prompts_of(lengths) for token in prompt]
                rows = [sum(lengths[: number + 1]) - 1 for number in range(len(lengths))]
                positions = [at for segment in segments for at in segment.positions]
                step = PagedAttention(pool, segments, model.device)
                expected = forward(model.module, step, tokens, positions, rows).clone()
                made = graphs.logits(segments, tokens, rows)
                assert made is not None
                assert logits_agree(made, expected, model.dtype)
