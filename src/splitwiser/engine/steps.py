"""The steps of a model over its KV pool, prefill, decode and hybrid, and the interface by which workers run them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from splitwiser.engine.decode_graphs import DecodeGraphs, capture_decode_graphs
from splitwiser.engine.logprobs import token_logprobs
from splitwiser.engine.messages import Phase, TokenLogprobs
from splitwiser.engine.penalties import TokenCounts
from splitwiser.engine.prefill_graphs import PrefillGraphs, capture_prefill_graphs
from splitwiser.engine.sampling import Sampled, finish_reason, sample
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import Segment
from splitwiser.model.routes import ROUTES
from splitwiser.request import FinishReason, Request, SamplingParams

WARM_UP_TOKENS = 8192  # the budget may be far larger than any real step
SHORT_PROMPT = 64  # tokens of each prompt of a step that is measured: longer ones would measure their attention too
WARM_UP_SOURCE = 512  # tokens of one source: with a bias its attention takes memory for every pair


@dataclass(eq=False)
class SequenceState:
    """State of a request in the KV pool: its blocks, the shared ones of its adapter first, its output tokens so far, and the
    log-probabilities of its prompt's tokens, from the second on, as far as they are computed and if it asks for them."""

    request: Request
    blocks: Sequence[int]
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _counts: TokenCounts | None = None

    @property
    def own_blocks(self) -> Sequence[int]:
        """Its blocks without the shared ones."""
        return self.blocks[len(self.request.adapter.shared_blocks) :]

    @property
    def asked_of_prompt(self) -> int | None:
        """Of how many of the likeliest tokens its prefill is to give log-probabilities at each place of the prompt; None for
        none, also if it was preempted, since it has given them."""
        return None if self.token_ids else self.params.prompt_logprobs

    @property
    def length(self) -> int:
        """Number of tokens of its prompt and output."""
        return len(self.request.prompt_token_ids) + len(self.token_ids)

    def tokens(self, start: int, end: int) -> Sequence[int]:
        """Return the tokens from number ``start`` to before ``end`` of its prompt and output."""
        prompt = self.request.prompt_token_ids
        if end <= len(prompt):
            return prompt[start:end]
        return [*prompt[start:], *self.token_ids[max(0, start - len(prompt)) : end - len(prompt)]]

    def segment(self, end: int, tokens: int, anew_at: int | None = None) -> Segment:
        """Return the part of a step that computes the ``tokens`` tokens up to number ``end`` of its prompt and output.
        ``anew_at`` is the length at which the model computes the K and V of all tokens together, as of a prompt."""
        adapter = self.request.adapter
        together = len(self.request.prompt_token_ids)
        if anew_at is not None and together < anew_at <= self.length:
            together = anew_at
        before = adapter.virtual_tokens
        return Segment(self.blocks, before + end, tokens, before + together, adapter.lora)

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters of the request."""
        return self.request.params

    @property
    def seed(self) -> int:
        """Seed of the request."""
        return self.request.seed

    @property
    def drawn(self) -> int:
        """Number of output tokens so far."""
        return len(self.token_ids)

    def token_counts(self, start_token_id: int | None) -> Tensor:
        """Return the tokens so far with their counts; see :meth:`TokenCounts.after`. An encoder's source is not among them,
        and the token ``start_token_id`` is, that an encoder-decoder's answers begin with."""
        if self._counts is None:
            before = self.request.prompt_token_ids if start_token_id is None else (start_token_id,)
            self._counts = TokenCounts(before, self.request.max_tokens)
        return self._counts.after(self.token_ids)

    def newest(self, count: int, anew_at: int | None = None) -> Segment:
        """Return the last ``count`` tokens as a decode step's part; ``anew_at`` is as for :meth:`segment`."""
        request = self.request
        newest = self.segment(request.prefilled_tokens + self.drawn, count, anew_at)
        return replace(newest, first=len(request.prompt_token_ids)) if request.encoded else newest


@dataclass(frozen=True)
class Chunk:
    """A part of a sequence's prompt, which for one that is recomputed its output follows: ``tokens`` tokens from position
    ``start`` on."""

    sequence: SequenceState
    start: int
    tokens: int

    @property
    def end(self) -> int:
        """Position after the chunk's last token."""
        return self.start + self.tokens

    @property
    def is_last(self) -> bool:
        """Whether the sequence ends with this chunk, so that its step gives the next output token."""
        return self.end == self.sequence.length


class Stepper(Protocol):
    """Interface of what runs the steps that a worker schedules."""

    def prefill(self, chunks: Sequence[Chunk]) -> Sampled:
        """Run a prefill step and return the next token of each sequence that ends in it, in order. Sequences that ask for
        the log-probabilities of their prompt get those of the chunks."""
        ...

    def decode(self, sequences: Sequence[SequenceState]) -> Sampled:
        """Run a decode step and return the next token of each sequence."""
        ...

    def hybrid(self, chunks: Sequence[Chunk], sequences: Sequence[SequenceState]) -> tuple[Sampled, Sampled]:
        """Run a prefill step of ``chunks`` and a decode step of ``sequences`` in one; return what each would return."""
        ...

    def finish_reason(self, sequence: SequenceState) -> FinishReason | None:
        """Return why ``sequence`` has finished, or None if it has not."""
        ...

    def now_ns(self) -> int:
        """Return the time of the clock that steps are timed by, in nanoseconds."""
        ...


@torch.inference_mode()
def prefill_step(
    model: LoadedModel, pool: KVPool, chunks: Sequence[Chunk], graphs: PrefillGraphs | None = None
) -> Sampled:
    """Compute K and V of ``chunks``, packed in one row without padding, and write them to their blocks.

    Returns, once the device has finished, the next token of each sequence that ends here, in order. With ``graphs``
    the forward is replayed as a CUDA graph, where one takes these chunks, instead of launched layer by layer.
    """
    segments, tokens = _pack(model, pool, chunks)
    rows, ends = _wanted_rows(chunks)
    rows = rows or [len(tokens) - 1]
    # a graph keeps the logits of the prompts' ends alone
    logits = graphs.logits(segments, tokens, rows) if graphs and len(rows) <= len(chunks) else None
    if logits is None:
        logits = ROUTES[model.kind].prefill(model, pool, segments, tokens, rows)
    logits = _take_prompt_logprobs(logits, ends, chunks)
    if not ends:  # only middle parts of prompts: no result is read back, so synchronise explicitly
        if model.device.type == "cuda":
            torch.cuda.current_stream(model.device).synchronize()  # not the whole device, where decode may be running
        return Sampled([])
    ended = [chunk.sequence for chunk in chunks if chunk.is_last]
    return sample(logits, ended, model.eos_token_ids, model.start_token_id, pool.kernels.likeliest)


def _wanted_rows(chunks: Sequence[Chunk]) -> tuple[list[int], list[int]]:
    """Return the numbers of the packed tokens of ``chunks`` whose logits are wanted: the ends of prompts, and all of prompts
    that ask for log-probabilities; and which of them are the ends."""
    rows: list[int] = []
    ends: list[int] = []
    total = 0
    for chunk in chunks:
        after, total = total, total + chunk.tokens
        if chunk.sequence.asked_of_prompt is not None:
            rows += range(after, total)
        elif chunk.is_last:
            rows.append(total - 1)
        if chunk.is_last:
            ends.append(len(rows) - 1)
    return rows, ends


def _take_prompt_logprobs(logits: Tensor, ends: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
    """Give each sequence that asks for the log-probabilities of its prompt those of the tokens that follow the tokens of its
    chunk. ``logits`` are of the rows of :func:`_wanted_rows`; returns those of the ``ends`` among them."""
    if len(logits) == len(ends):
        return logits
    row = 0
    for chunk in chunks:
        sequence, count = chunk.sequence, chunk.sequence.asked_of_prompt
        if count is None:
            row += chunk.is_last
            continue
        following = sequence.request.prompt_token_ids[chunk.start + 1 : chunk.end + 1]
        if following:
            token_ids = torch.tensor(following, device=logits.device)
            part = logits[row : row + len(following)]
            sequence.prompt_logprobs += token_logprobs(part, token_ids, [count] * len(following))
        row += chunk.tokens
    return logits[torch.tensor(ends, dtype=torch.long, device=logits.device)]


@torch.inference_mode()
def decode_step(
    model: LoadedModel, pool: KVPool, sequences: Sequence[SequenceState], graphs: DecodeGraphs | None = None
) -> Sampled:
    """Write K and V of each sequence's last token to the pool and return its next token, once the device has finished.

    Of a sequence that :func:`_newest` gives all tokens of, the K and V of all are written. With ``graphs`` the forward is
    replayed as a CUDA graph instead of launched layer by layer.
    """
    segments, tokens = _newest(model, sequences)
    if graphs and len(tokens) == len(sequences):
        logits = graphs.logits(segments, tokens)
    else:
        logits = ROUTES[model.kind].decode(model, pool, segments, tokens)
    return sample(logits, sequences, model.eos_token_ids, model.start_token_id, pool.kernels.likeliest)


@torch.inference_mode()
def hybrid_step(
    model: LoadedModel, pool: KVPool, chunks: Sequence[Chunk], sequences: Sequence[SequenceState]
) -> tuple[Sampled, Sampled]:
    """Run :func:`prefill_step` of ``chunks`` and :func:`decode_step` of ``sequences``, at least one each, in one forward, so
    that the weights are read once; without CUDA graphs. Returns the results of both."""
    segments, tokens = _pack(model, pool, chunks)
    newest, last_tokens = _newest(model, sequences)
    rows, ends = _wanted_rows(chunks)
    logits = ROUTES[model.kind].hybrid(model, pool, segments, tokens, rows, newest, last_tokens)
    if len(rows) > len(ends):
        at_ends = _take_prompt_logprobs(logits[: len(rows)], ends, chunks)
        logits = torch.cat([at_ends, logits[len(rows) :]])
    sampling = [*(chunk.sequence for chunk in chunks if chunk.is_last), *sequences]
    sampled = sample(logits, sampling, model.eos_token_ids, model.start_token_id, pool.kernels.likeliest)
    firsts, nexts = slice(len(ends)), slice(len(ends), None)
    return (
        Sampled(sampled.tokens[firsts], sampled.logprobs[firsts]),
        Sampled(sampled.tokens[nexts], sampled.logprobs[nexts]),
    )


def _pack(model: LoadedModel, pool: KVPool, chunks: Sequence[Chunk]) -> tuple[list[Segment], list[int]]:
    """Return the segments of ``chunks``, and their tokens one after another. The tokens of adapters that share a block with
    a prompt are copied there before its first chunk."""
    for chunk in chunks:
        adapter = chunk.sequence.request.adapter
        if chunk.start == 0 and adapter.tail_tokens:
            pool.copy_tokens(adapter.blocks[-1], chunk.sequence.own_blocks[0], adapter.tail_tokens)
    tokens = [token for chunk in chunks for token in chunk.sequence.tokens(chunk.start, chunk.end)]
    return [chunk.sequence.segment(chunk.end, chunk.tokens, model.computed_anew_at) for chunk in chunks], tokens


def _newest(model: LoadedModel, sequences: Sequence[SequenceState]) -> tuple[list[Segment], list[int]]:
    """Return the segments of a decode step over ``sequences``, and their tokens one after another: the last of each, or all
    of one that has reached the length at which the model computes all K and V anew."""
    anew_at = model.computed_anew_at
    lengths = [each.request.prefilled_tokens + each.drawn for each in sequences]
    new = [length if length == anew_at else 1 for length in lengths]
    segments = [each.newest(count, anew_at) for each, count in zip(sequences, new, strict=True)]
    return segments, [token for each, count in zip(sequences, new, strict=True) for token in _last_tokens(each, count)]


@dataclass(frozen=True)
class ModelStepper:
    """The :class:`Stepper` that runs a model over its KV pool; steps replay graphs if given."""

    model: LoadedModel
    pool: KVPool
    decode_graphs: DecodeGraphs | None = None
    prefill_graphs: PrefillGraphs | None = None

    def measure_prefill(self, tokens: int) -> float:
        """Return the seconds of the fastest of three prefill steps of ``tokens`` tokens of short prompts, launched layer by
        layer as hybrid steps are. Their K and V overwrite the pool's first blocks."""
        chunks = _chunks_of_prompts(self.model, self.pool, tokens, SHORT_PROMPT)
        times = []
        for _ in range(3):
            start_ns = self.now_ns()
            prefill_step(self.model, self.pool, chunks)
            times.append(self.now_ns() - start_ns)
        return min(times) / 1e9

    def prefill(self, chunks: Sequence[Chunk]) -> Sampled:
        """See :meth:`Stepper.prefill`."""
        return prefill_step(self.model, self.pool, chunks, self.prefill_graphs)

    def decode(self, sequences: Sequence[SequenceState]) -> Sampled:
        """See :meth:`Stepper.decode`."""
        return decode_step(self.model, self.pool, sequences, self.decode_graphs)

    def hybrid(self, chunks: Sequence[Chunk], sequences: Sequence[SequenceState]) -> tuple[Sampled, Sampled]:
        """See :meth:`Stepper.hybrid`."""
        return hybrid_step(self.model, self.pool, chunks, sequences)

    def finish_reason(self, sequence: SequenceState) -> FinishReason | None:
        """See :meth:`Stepper.finish_reason`."""
        return finish_reason(sequence.params, sequence.token_ids, self.model.eos_token_ids, self.model.decode)

    def now_ns(self) -> int:
        """See :meth:`Stepper.now_ns`."""
        return time.perf_counter_ns()


def make_stepper(
    model: LoadedModel,
    pool: KVPool,
    max_batch: int,
    budget: int,
    streams: Mapping[Phase, Sequence["torch.cuda.Stream"]],
) -> tuple[ModelStepper, dict[str, str]]:
    """Return the stepper of a worker that runs the phases in ``streams``, each on one of its streams (the current one if it
    names none), warmed up and with CUDA graphs on a GPU; and a description of the graphs. Overwrites the pool's first
    blocks."""
    decode_graphs, prefill_graphs, described = None, None, {}
    if "decode" in streams:
        decode_graphs, described["decode_graphs"] = capture_decode_graphs(model, pool, max_batch, streams["decode"])
    if "prefill" in streams:
        warm_up_prefill(model, pool, budget, streams["prefill"])
        prefill_graphs, described["prefill_graphs"] = capture_prefill_graphs(model, pool, budget, streams["prefill"])
    return ModelStepper(model, pool, decode_graphs, prefill_graphs), described


def warm_up_prefill(model: LoadedModel, pool: KVPool, budget: int, streams: Sequence["torch.cuda.Stream"] = ()) -> None:
    """On a GPU, run a prefill step of ``budget`` tokens (at most :data:`WARM_UP_TOKENS`) on each of ``streams``, or on the
    current stream, before any request: the first step on a stream loads kernels, tunes matrix products and allocates a
    workspace. Its K and V overwrite the pool's first blocks. On a CPU, do nothing."""
    if model.device.type != "cuda":
        return
    budget = min(budget, WARM_UP_TOKENS)
    chunks = _chunks_of_prompts(
        model, pool, budget, WARM_UP_SOURCE if model.encodes and not model.max_positions else budget
    )
    for stream in streams or [torch.cuda.current_stream(model.device)]:
        with torch.cuda.stream(stream):
            prefill_step(model, pool, chunks)


def _chunks_of_prompts(model: LoadedModel, pool: KVPool, tokens: int, longest: int) -> list[Chunk]:
    """Return the chunks of a step over ``tokens`` tokens of equal prompts in the pool's first blocks, which have at most
    ``longest`` tokens and no more than model and pool have room for."""
    room = pool.blocks * pool.block_tokens - model.encodes
    length = min(tokens, room, longest, model.max_positions or longest)
    request = Request(0, (0,) * length, SamplingParams(max_tokens=1), seed=0, encoded=model.encodes)
    prompt = SequenceState(request, range(pool.blocks_for(request.max_kv_tokens)))
    return [Chunk(prompt, 0, length)] * max(1, tokens // length)


def _last_tokens(sequence: SequenceState, count: int) -> Sequence[int]:
    """Return the last ``count`` tokens of a sequence's prompt and output."""
    return sequence.token_ids[-1:] if count == 1 else sequence.tokens(sequence.length - count, sequence.length)
