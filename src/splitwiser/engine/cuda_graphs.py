"""Decode steps of fixed sizes: on a GPU captured once as CUDA graphs and replayed, so that a step is one launch instead of
some hundred, which is what bounds small models there.

A graph runs on the multiprocessors of the stream that it was captured on, so each stream that decode may use has graphs
of its own.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from tqdm import tqdm

from splitwiser.errors import UnsupportedModelError, first_line
from splitwiser.model.attention import AttentionOptions, AttentionStep, Mask
from splitwiser.model.forward import forward
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import Segment


class _FixedStep(AttentionStep):
    """A decode step of ``size`` requests whose inputs lie in buffers that stay where they are, so that a graph finds the
    next step's there. Where there are fewer requests, the last is repeated: it writes the same K and V once more."""

    def __init__(self, pool: KVPool, size: int, width: int, device: torch.device) -> None:
        self.size = size
        self._pool = pool
        self._layer = -1
        self._members: list[Sequence[int]] = []
        self._host = torch.zeros(4 * size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(4 * size, dtype=torch.int64, device=device)
        self._staged = self._host.split(size)
        self.tokens, self.positions, self._slots, self._lengths = self._device.split(size)
        self._tables = torch.zeros(size, width, dtype=torch.int64, device=device)
        self._offsets = torch.arange(size + 1, device=device)
        self._first = torch.zeros(size, dtype=torch.int64, device=device)  # where each token's view begins, if causal
        self._starts: dict[Mask, Tensor] = {}
        self._lengths.fill_(1)  # of no request yet: one token in slot 0, where any request writes before it reads

    def load(self, segments: Sequence[Segment], tokens: Sequence[int]) -> None:
        """Bring the next step's inputs into the buffers: one copy, and another where the batch has changed."""
        repeated = self.size - len(segments)
        size = self._pool.block_tokens
        staged_tokens, positions, slots, lengths = self._staged
        last = [segment.context - 1 for segment in segments]
        rows = (
            (staged_tokens, tokens),
            (positions, last),
            (slots, [each.blocks[at // size] * size + at % size for each, at in zip(segments, last, strict=True)]),
            (lengths, [segment.context for segment in segments]),
        )
        for staged, numbers in rows:
            staged.copy_(torch.tensor([*numbers, *[numbers[-1]] * repeated]))
        self._device.copy_(self._host, non_blocking=True)
        members = [segment.blocks for segment in segments]
        if [*map(id, members)] != [*map(id, self._members)]:  # a request keeps its blocks: tables change with the batch
            self._load_tables([*members, *members[-1:] * repeated])
            self._members = members

    def _load_tables(self, blocks: Sequence[Sequence[int]]) -> None:
        """Write the columns that are in use; what lies beyond is never read."""
        most = max(map(len, blocks))
        columns = torch.tensor([[*row, *[0] * (most - len(row))] for row in blocks])
        if self._tables.is_cuda:
            columns = columns.pin_memory().to(self._tables.device, non_blocking=True)
        self._tables[:, :most] = columns

    def begin(self) -> None:
        """Forget the masks of the last forward; each brings its own."""
        self._starts.clear()

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """See :meth:`splitwiser.model.attention.AttentionStep.update`."""
        self._layer = layer_idx
        self._pool.write(layer_idx, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """See :meth:`splitwiser.model.attention.AttentionStep.attend`."""
        assert self._pool.kernels.decode is not None
        assert isinstance(mask, Mask)
        return self._pool.kernels.decode(
            query[0].transpose(0, 1), self._pool.keys[self._layer], self._pool.values[self._layer],
            self._tables, self._first_seen(mask), self._offsets, self._lengths,
            options.scaling, options.softcap, options.sinks,
        ).unsqueeze(0)  # fmt: skip

    def _first_seen(self, mask: Mask) -> Tensor:
        """The first position that each token sees, (size,). Layers share it: for a window it is some ten kernels over every
        position that there can be."""
        if mask.is_causal:
            return self._first
        if mask not in self._starts:
            positions = torch.arange(self._tables.shape[1] * self._pool.block_tokens, device=self._lengths.device)
            if not (positions.is_cuda and torch.cuda.is_current_stream_capturing()):
                _check_reach(mask, positions)
            seen = mask(self._lengths[:, None] - 1, positions[None]) & (positions[None] < self._lengths[:, None])
            self._starts[mask] = self._lengths - seen.sum(dim=-1)
        return self._starts[mask]


def _check_reach(mask: Mask, positions: Tensor) -> None:
    """Refuse a mask under which a token does not see all from some position on: ``starts`` could not stand for it."""
    asked = positions[:: max(1, len(positions) // 64), None]
    seen = mask(asked, positions[None]) & (positions[None] <= asked)
    first = asked[:, 0] + 1 - seen.sum(dim=-1)
    if not bool((seen == ((positions[None] >= first[:, None]) & (positions[None] <= asked))).all()):
        raise UnsupportedModelError("a mask with holes")


class DecodeGraphs:
    """The logits of decode steps for up to ``max_batch`` requests, from steps of fixed sizes (the powers of 2, and
    ``max_batch``): captured as graphs for each of ``streams``; without any, run as they are.

    Raises :class:`~splitwiser.errors.UnsupportedModelError` for a mask that fixed steps cannot serve, and RuntimeError
    where a forward cannot be captured.
    """

    def __init__(
        self, model: LoadedModel, pool: KVPool, max_batch: int, streams: Sequence["torch.cuda.Stream"] = ()
    ) -> None:
        self._model = model
        width = pool.blocks if model.max_positions is None else min(pool.blocks, pool.blocks_for(model.max_positions))
        self._steps = [_FixedStep(pool, size, width, model.device) for size in ladder(max_batch)]
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if not streams:
            return
        self._memory = torch.cuda.graph_pool_handle()
        # the default stream cannot be captured, but replays any graph: one stream for all of its graphs, since memory that a
        # graph leaves is used again on the same stream only
        aside = torch.cuda.Stream(model.device)
        default = torch.cuda.default_stream(model.device)
        # the largest first, so that the smaller ones find room in its memory
        work = [(stream, step) for stream in streams for step in reversed(self._steps)]
        for stream, step in tqdm(work, desc="CUDA graphs", unit="graph", disable=None, leave=False):
            captured = self._capture(aside if stream == default else stream, step)
            self._graphs[stream.cuda_stream, step.size] = captured

    @torch.inference_mode()
    def logits(self, segments: Sequence[Segment], tokens: Sequence[int]) -> Tensor:
        """Logits after the last token of each request, shape (requests, vocabulary); they hold until the next call.

        On a GPU the current stream must be one of ``streams``.
        """
        step = next(step for step in self._steps if step.size >= len(segments))
        step.load(segments, tokens)
        if not self._graphs:
            return self._forward(step)[: len(segments)]
        graph, logits = self._graphs[torch.cuda.current_stream(self._model.device).cuda_stream, step.size]
        graph.replay()
        return logits[: len(segments)]

    @torch.inference_mode()
    def _capture(self, stream: "torch.cuda.Stream", step: _FixedStep) -> tuple["torch.cuda.CUDAGraph", Tensor]:
        torch.cuda.synchronize(self._model.device)
        with torch.cuda.stream(stream):
            self._forward(step)  # compiles kernels and makes handles, which a capture must not
            stream.synchronize()
        with _capturing(self._memory, stream) as graph:
            logits = self._forward(step)
        return graph, logits

    def _forward(self, step: _FixedStep) -> Tensor:
        step.begin()
        rows = torch.arange(step.size, device=self._model.device)
        return forward(self._model.module, step, step.tokens, step.positions, rows)


@contextmanager
def _capturing(memory: "torch.cuda._POOL_HANDLE", stream: "torch.cuda.Stream") -> Iterator["torch.cuda.CUDAGraph"]:
    """Capture what this thread launches on ``stream`` into a graph in the pool ``memory``. Where that fails, the thread has
    its own stream back and the device's allocator goes on as before, and RuntimeError says what broke the capture."""
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream(stream.device)
    collects = gc.isenabled()
    gc.disable()  # a collection could unload a compiled kernel or free memory, which a capture must not
    try:
        # thread_local: another thread's calls do not break the capture
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            yield graph
    except Exception as error:
        # PyTorch leaves the capture's stream current, and its allocator capturing, where CUDA ends a capture with an error
        torch.cuda.set_stream(before)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, memory)
        raise RuntimeError(first_line(_first_cause(error))) from error
    finally:
        if collects:
            gc.enable()


def _first_cause(error: BaseException) -> BaseException:
    """What broke first: the end of a broken capture raises another error over it."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def ladder(max_batch: int) -> list[int]:
    """The sizes of steps that are made: the powers of 2 below ``max_batch``, and ``max_batch``."""
    return [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch] + [max_batch]


def capture_graphs(
    model: LoadedModel, pool: KVPool, max_batch: int, streams: Sequence["torch.cuda.Stream"] | None = None
) -> tuple[DecodeGraphs | None, str]:
    """Graphs for decode on ``streams`` (None: on the current one), and a line for the run's record; None, and the reason,
    where steps are launched piece by piece instead."""
    if model.device.type != "cuda":
        return None, "none (they are a GPU's)"
    if pool.kernels.decode is None:
        return None, "none (they need the compiled decode attention)"
    try:
        graphs = DecodeGraphs(model, pool, max_batch, streams or [torch.cuda.current_stream(model.device)])
    except Exception as error:  # whatever a foreign forward or Triton raises means the same: no graphs
        return None, f"none ({type(model.module).__name__} cannot be captured: {first_line(error)})"
    return graphs, f"for {', '.join(map(str, ladder(max_batch)))} requests"
