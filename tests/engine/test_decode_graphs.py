"""Decode steps of fixed sizes give the tokens of steps of any size; their capture needs a GPU."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from splitwiser import LLM, SamplingParams
from splitwiser.engine.cuda_graphs import _first_cause
from splitwiser.engine.decode_graphs import DecodeGraphs, capture_decode_graphs, graph_sizes
from splitwiser.engine.steps import Chunk, SequenceState, decode_step, prefill_step
from splitwiser.errors import UnsupportedModelError
from splitwiser.model.attention import Mask
from splitwiser.model.fixed_step import FixedDecodeStep
from splitwiser.model.kernels.choose import load_kernels
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.model.routes import ROUTES
from splitwiser.request import Request
from tests.support.assertions import assert_says
from tests.support.tokens import LENGTHS, SERVED, prompts_of

BLOCK = 16
WITH_BIAS = ["falcon_rw", "mpt"]  # by the position of the key, and by its distance


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])]
)
def test_sizes_are_powers_of_two_up_to_the_largest_batch(max_batch: int, sizes: list[int]) -> None:
    assert graph_sizes(max_batch) == sizes


def loaded(directory: Path, device: str = "cpu") -> tuple[LoadedModel, KVPool]:
    model = load_model(directory, dtype="float32", device=device, load_format="auto")
    layers = ROUTES[model.kind].attach(model)
    kernels, described = load_kernels("auto", model.device, model.dtype, layers)
    if kernels.decode is None:
        pytest.skip(f"fixed steps need the compiled decode attention: {described['decode_attention']}")
    return model, KVPool(layers, 64, BLOCK, model.dtype, model.device, kernels=kernels)


def in_flight(prompts: Sequence[Sequence[int]], new_tokens: int, encoded: bool = False) -> list[SequenceState]:
    """The prompts with blocks of their own, given out from the pool's end so that no table is in order."""
    sequences, free = [], list(range(64))
    params = SamplingParams(max_tokens=new_tokens, temperature=0)
    for number, prompt in enumerate(prompts):
        count = -(-(len(prompt) + new_tokens) // BLOCK)
        blocks = [free.pop() for _ in range(count)][::-1]
        sequences.append(SequenceState(Request(number, tuple(prompt), params, 0, encoded=encoded), blocks))
    return sequences


def tokens_of(model: LoadedModel, pool: KVPool, graphs: DecodeGraphs | None) -> list[list[int]]:
    """Twelve tokens each, of a batch that changes: one request leaves half-way, and another takes its blocks."""
    sequences = in_flight(prompts_of(LENGTHS[:5]), 14, model.encodes)
    request = Request(9, (5, 6, 7), sequences[0].params, 0, encoded=model.encodes)
    last = SequenceState(request, list(sequences[2].blocks))
    for sequence in sequences:
        sequence.token_ids += prefill_step(
            model, pool, [Chunk(sequence, 0, len(sequence.request.prompt_token_ids))]
        ).tokens
    running = list(sequences)
    for step in range(12):
        if step == 6:
            running[2] = last
            last.token_ids += prefill_step(model, pool, [Chunk(last, 0, 3)]).tokens
        for sequence, token in zip(running, decode_step(model, pool, running, graphs).tokens, strict=True):
            sequence.token_ids.append(token)
    return [sequence.token_ids for sequence in [*sequences, last]]


@pytest.mark.parametrize("name", [*SERVED, *WITH_BIAS, "flan_t5", "bart"])
def test_fixed_steps_make_the_same_tokens(name: str, tiny: Callable[[str], Path]) -> None:
    model, pool = loaded(tiny(name))
    expected = tokens_of(model, pool, None)
    assert tokens_of(model, pool, DecodeGraphs(model, pool, max_batch=8)) == expected


def test_fixed_steps_add_each_requests_own_adapter(tiny: Callable[[str], Path]) -> None:
    from tests.support.adapters import make_adapter  # skips without peft

    directory = tiny("llama")
    given = {name: make_adapter(name, directory) for name in ("lora", "rslora", "prompt")}
    prompts, names = prompts_of(LENGTHS[:5]), ["rslora", "none", "lora", "prompt", "rslora"]
    with LLM(directory, adapters=given) as llm:
        model, pool = llm.model, llm.started.pool
        assert pool is not None
        if pool.kernels.decode is None:
            pytest.skip("fixed steps need the compiled decode attention")
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        expected = [each.token_ids for each in llm.generate(prompts, params, adapter=names)]
        graphs = DecodeGraphs(model, pool, max_batch=8)  # pads the batch of 5
        sequences = []
        for number, request in enumerate(llm.make_requests(prompts, params, adapter=names)):
            blocks = [*request.adapter.shared_blocks, *range(number * 10, number * 10 + 10)]
            sequences.append(SequenceState(request, blocks))
        chunks = [Chunk(each, 0, len(each.request.prompt_token_ids)) for each in sequences]
        made = [prefill_step(model, pool, chunks).tokens]
        for _ in range(7):
            for sequence, token in zip(sequences, made[-1], strict=True):
                sequence.token_ids.append(token)
            made.append(decode_step(model, pool, sequences, graphs).tokens)
    assert [list(tokens) for tokens in zip(*made, strict=True)] == expected


def test_a_mask_with_holes_is_refused(tiny: Callable[[str], Path]) -> None:
    model, pool = loaded(tiny("mistral"))

    def every_other(_batch: int, _head: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & ((query - key) % 2 == 0)

    graphs = DecodeGraphs(model, pool, max_batch=1)
    step = graphs._steps[0]
    with pytest.raises(UnsupportedModelError, match="holes"):
        step.attend(torch.zeros(1, 4, 1, 12), torch.empty(0), torch.empty(0), Mask(every_other), None)  # type: ignore[arg-type]


def test_tables_are_sent_only_where_the_batch_changes(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    load_tables = FixedDecodeStep._load_tables

    def noting(step: FixedDecodeStep, rows: Sequence[int], blocks: Sequence[Sequence[int]]) -> None:
        sent.append(len(rows))
        load_tables(step, rows, blocks)

    monkeypatch.setattr(FixedDecodeStep, "_load_tables", noting)
    model, pool = loaded(tiny("opt"))
    tokens_of(model, pool, DecodeGraphs(model, pool, max_batch=8))
    assert sent == [8, 1]  # twelve steps, and one request takes another's place half-way


def test_layers_share_what_a_mask_means(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Mask] = []
    call = Mask.__call__

    def noting(mask: Mask, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        asked.append(mask)
        return call(mask, queries, keys)

    model, pool = loaded(tiny("mistral"))  # three layers under one window
    graphs = DecodeGraphs(model, pool, max_batch=1)
    (sequence,) = in_flight([[5, 6, 7]], 4)
    sequence.token_ids += prefill_step(model, pool, [Chunk(sequence, 0, 3)]).tokens
    monkeypatch.setattr(Mask, "__call__", noting)
    for steps in (1, 2):
        sequence.token_ids += decode_step(model, pool, [sequence], graphs).tokens
        assert len(asked) == 2 * steps  # whether it can be served, and where each token's view begins
        assert len(set(map(id, asked))) == steps  # each forward brings its own


def test_a_broken_capture_is_told_by_what_broke_it() -> None:
    cause, end = ValueError("an expert was chosen on the host"), RuntimeError("CUDA error: a previous error")
    end.__context__ = cause
    assert _first_cause(end) is cause


def test_without_a_gpu_nothing_is_captured(tiny: Callable[[str], Path]) -> None:
    model, pool = loaded(tiny("opt"))
    assert capture_decode_graphs(model, pool, 4) == (None, "none (CUDA graphs need a GPU)")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SERVED, *WITH_BIAS])
def test_replayed_graphs_make_the_same_tokens(name: str, tiny: Callable[[str], Path]) -> None:
    model, pool = loaded(tiny(name), "cuda")
    expected = tokens_of(model, pool, None)
    graphs, described = capture_decode_graphs(model, pool, 8)
    if graphs is None and name == "gpt_oss":
        pytest.skip(f"a mixture of experts may choose its experts on the host: {described}")
    assert graphs is not None, described
    assert tokens_of(model, pool, graphs) == expected


def on_the_host(*_: Any, **__: Any) -> torch.Tensor:
    """Attention that asks for a number, which no capture allows."""
    return torch.full((1,), float(torch.ones(1, device="cuda").sum()), device="cuda")


def unfit(*_: Any, **__: Any) -> torch.Tensor:
    raise LookupError("out of resource: shared memory")  # as Triton's errors, no RuntimeError


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("broken", "cause"), [(on_the_host, "not permitted when stream is capturing"), (unfit, "out of resource")]
)
def test_a_capture_that_fails_says_why_and_leaves_the_process_as_it_was(
    broken: Any, cause: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pool = loaded(tiny("llama"), "cuda")
    expected = tokens_of(model, pool, None)
    stream, forward = torch.cuda.current_stream(), DecodeGraphs._forward

    def failing(graphs: DecodeGraphs, step: FixedDecodeStep) -> torch.Tensor:
        logits = forward(graphs, step)
        return broken() if torch.cuda.is_current_stream_capturing() else logits

    with monkeypatch.context() as patched:
        patched.setattr(DecodeGraphs, "_forward", failing)
        graphs, described = capture_decode_graphs(model, pool, 4)
    assert graphs is None
    assert_says(described, "LlamaForCausalLM cannot be captured", cause)
    assert torch.cuda.current_stream() == stream
    assert tokens_of(model, pool, None) == expected
    block = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    reserved = torch.cuda.memory_reserved()
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - (64 << 20)


@pytest.mark.gpu
def test_graphs_of_the_default_stream_are_captured_on_one_other(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []
    capture = DecodeGraphs._capture

    def noting(graphs: DecodeGraphs, stream: torch.cuda.Stream, step: FixedDecodeStep) -> Any:
        captured.append(stream.cuda_stream)
        return capture(graphs, stream, step)

    model, pool = loaded(tiny("opt"), "cuda")
    monkeypatch.setattr(DecodeGraphs, "_capture", noting)
    graphs, described = capture_decode_graphs(model, pool, 8)
    assert graphs is not None, described
    assert len(captured) == len(graph_sizes(8))
    assert len(set(captured)) == 1  # a private pool's memory is used again on the stream that it was used on
    assert captured[0] != torch.cuda.default_stream().cuda_stream


@pytest.mark.gpu
def test_nothing_is_collected_during_a_capture(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    collects: list[bool] = []
    forward = DecodeGraphs._forward

    def noting(graphs: DecodeGraphs, step: FixedDecodeStep) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            collects.append(gc.isenabled())
        return forward(graphs, step)

    model, pool = loaded(tiny("opt"), "cuda")
    monkeypatch.setattr(DecodeGraphs, "_forward", noting)
    graphs, described = capture_decode_graphs(model, pool, 2)
    assert graphs is not None, described
    assert collects == [False, False]  # a collection could unload a compiled kernel
    assert gc.isenabled()


@pytest.mark.gpu
def test_a_graph_runs_on_the_stream_it_is_asked_on(tiny: Callable[[str], Path]) -> None:
    model, pool = loaded(tiny("llama"), "cuda")
    expected = tokens_of(model, pool, None)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    graphs, described = capture_decode_graphs(model, pool, 8, streams)
    assert graphs is not None, described
    for stream in streams:
        with torch.cuda.stream(stream):
            assert tokens_of(model, pool, graphs) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"share": "none"}, {"share": "auto", "itl_target_ms": 1.0}])
def test_green_makes_the_tokens_of_sequential(settings: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS * 3)
    made = []
    for mode, given in (("sequential", {}), ("green", settings)):
        with LLM(tiny("llama"), mode=mode, device="cuda", dtype="float32", **given) as llm:
            made.append([output.token_ids for output in llm.generate(prompts, SamplingParams(max_tokens=24))])
    assert made[0] == made[1]
