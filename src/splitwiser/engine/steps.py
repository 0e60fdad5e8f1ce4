"""The two functions that every engine mode runs, one prefill step and one decode step, and what workers run them by."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from splitwiser.engine.cuda_graphs import DecodeGraphs
from splitwiser.engine.sampling import choose
from splitwiser.engine.stopping import finish_reason
from splitwiser.model.forward import forward
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import PagedAttention, Segment
from splitwiser.request import FinishReason, Request, SamplingParams

WARM_UP_TOKENS = 8192  # a budget may be far more than any step has


@dataclass(eq=False)
class InFlight:
    """A request in the pool: its blocks and the tokens drawn for it so far."""

    request: Request
    blocks: Sequence[int]
    token_ids: list[int] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.request.params

    @property
    def seed(self) -> int:
        """The request's seed."""
        return self.request.seed

    @property
    def drawn(self) -> int:
        """Tokens drawn so far."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Chunk:
    """``tokens`` tokens of a sequence's prompt, from position ``start`` on."""

    sequence: InFlight
    start: int
    tokens: int

    @property
    def end(self) -> int:
        """The position after the chunk's last."""
        return self.start + self.tokens

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with this chunk, so that its first token is due."""
        return self.end == len(self.sequence.request.prompt_token_ids)


class Stepper(Protocol):
    """Runs the steps that a worker schedules."""

    def prefill(self, chunks: Sequence[Chunk]) -> list[int]:
        """Run a prefill step; returns the first token of each sequence whose prompt ends in it, in order."""
        ...

    def decode(self, sequences: Sequence[InFlight]) -> list[int]:
        """Run a decode step; returns the next token of each sequence."""
        ...

    def finish_reason(self, sequence: InFlight) -> FinishReason | None:
        """Why ``sequence`` has finished, or None while it has not."""
        ...

    def now_ns(self) -> int:
        """The clock that steps are timed by, in nanoseconds."""
        ...


@torch.inference_mode()
def prefill_step(model: LoadedModel, pool: KVPool, chunks: Sequence[Chunk]) -> list[int]:
    """Compute K and V of ``chunks``, packed in one row, into their blocks.

    Returns the first token of each sequence whose prompt ends here, in order, when the device has finished.
    """
    tokens = [token for chunk in chunks for token in chunk.sequence.request.prompt_token_ids[chunk.start : chunk.end]]
    segments = [Segment(chunk.sequence.blocks, chunk.end, chunk.tokens) for chunk in chunks]
    ends, total = [], 0
    for chunk in chunks:
        total += chunk.tokens
        if chunk.is_last:
            ends.append(total - 1)
    step = PagedAttention(pool, segments, model.device)
    logits = forward(model.module, step, tokens, _positions(segments), ends or [total - 1])
    if not ends:  # the middle of a long prompt: nothing is read back, so wait for the device explicitly
        if model.device.type == "cuda":
            torch.cuda.current_stream(model.device).synchronize()  # not the device: decode may be at work beside this
        return []
    return choose(logits, [chunk.sequence for chunk in chunks if chunk.is_last]).tolist()


@torch.inference_mode()
def decode_step(
    model: LoadedModel, pool: KVPool, sequences: Sequence[InFlight], graphs: DecodeGraphs | None = None
) -> list[int]:
    """Store K and V of each sequence's last token and return its next one, when the device has finished. With ``graphs``
    the forward is replayed instead of launched layer by layer."""
    segments = [Segment(each.blocks, len(each.request.prompt_token_ids) + len(each.token_ids), 1) for each in sequences]
    tokens = [each.token_ids[-1] for each in sequences]
    if graphs:
        logits = graphs.logits(segments, tokens)
    else:
        step = PagedAttention(pool, segments, model.device)
        logits = forward(model.module, step, tokens, _positions(segments), range(len(sequences)))
    return choose(logits, sequences).tolist()


@dataclass(frozen=True)
class ModelStepper:
    """The :class:`Stepper` of a model over its pool; ``graphs`` replay decode steps."""

    model: LoadedModel
    pool: KVPool
    graphs: DecodeGraphs | None = None

    def prefill(self, chunks: Sequence[Chunk]) -> list[int]:
        """See :meth:`Stepper.prefill`."""
        return prefill_step(self.model, self.pool, chunks)

    def decode(self, sequences: Sequence[InFlight]) -> list[int]:
        """See :meth:`Stepper.decode`."""
        return decode_step(self.model, self.pool, sequences, self.graphs)

    def finish_reason(self, sequence: InFlight) -> FinishReason | None:
        """See :meth:`Stepper.finish_reason`."""
        return finish_reason(sequence.params, sequence.token_ids, self.model.eos_token_ids, self.model.decode)

    def now_ns(self) -> int:
        """See :meth:`Stepper.now_ns`."""
        return time.perf_counter_ns()


def warm_up_prefill(model: LoadedModel, pool: KVPool, budget: int, streams: Sequence["torch.cuda.Stream"] = ()) -> None:
    """On a GPU, run a prefill step of ``budget`` tokens (:data:`WARM_UP_TOKENS` at most) on each of ``streams``, or on the
    current one, before there are requests: the first step on a stream loads kernels, tries products out and takes a
    workspace. Its K and V go into the pool's first blocks. On a CPU, do nothing."""
    if model.device.type != "cuda":
        return
    budget = min(budget, WARM_UP_TOKENS)
    length = min(budget, pool.blocks * pool.block_tokens, model.max_positions or budget)
    prompt = InFlight(Request(0, (0,) * length, SamplingParams(max_tokens=1), seed=0), range(pool.blocks_for(length)))
    for stream in streams or [torch.cuda.current_stream(model.device)]:
        with torch.cuda.stream(stream):
            prefill_step(model, pool, [Chunk(prompt, 0, length)] * max(1, budget // length))


def _positions(segments: Sequence[Segment]) -> list[int]:
    return [position for segment in segments for position in segment.positions]
