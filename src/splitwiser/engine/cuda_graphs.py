"""Decode steps of fixed batch sizes, captured on a GPU as CUDA graphs and replayed.

A replayed step is one launch instead of a hundred or more, and launches are what limits small models on a GPU. A graph
runs on the multiprocessors of the stream that it was captured on, so each stream that decode may use has its own graphs.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from tqdm import tqdm

from splitwiser.errors import first_line
from splitwiser.model.fixed_step import FixedStep
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import Segment
from splitwiser.model.routes import ROUTES


class DecodeGraphs:
    """Computes logits of decode steps for up to ``max_batch`` requests, with steps of fixed sizes (see :func:`graph_sizes`).

    Each step is captured as a CUDA graph for each of ``streams``; without streams, steps run without graphs. Raises
    :class:`~splitwiser.errors.UnsupportedModelError` for a mask that fixed steps cannot serve, and RuntimeError if a
    forward cannot be captured.
    """

    def __init__(
        self, model: LoadedModel, pool: KVPool, max_batch: int, streams: Sequence["torch.cuda.Stream"] = ()
    ) -> None:
        self._model = model
        longest = model.longest_request
        width = pool.blocks if longest is None else min(pool.blocks, pool.blocks_for(longest))
        sizes = graph_sizes(max_batch)
        self._steps = [FixedStep(pool, size, width, model.device, sources=model.encodes) for size in sizes]
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if not streams:
            return
        self._memory = torch.cuda.graph_pool_handle()
        # the default stream cannot be captured but can replay any graph; all of its graphs are captured on one other stream,
        # since memory that a graph frees is reused only on the same stream
        aside = torch.cuda.Stream(model.device)
        default = torch.cuda.default_stream(model.device)
        # the largest first, so that the smaller ones reuse its memory
        work = [(stream, step) for stream in streams for step in reversed(self._steps)]
        for stream, step in tqdm(work, desc="CUDA graphs", unit="graph", disable=None, leave=False):
            captured = self._capture(aside if stream == default else stream, step)
            self._graphs[stream.cuda_stream, step.size] = captured

    @torch.inference_mode()
    def logits(self, segments: Sequence[Segment], tokens: Sequence[int]) -> Tensor:
        """Return the logits after each request's last token, shape (requests, vocabulary); the next call overwrites them.

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
    def _capture(self, stream: "torch.cuda.Stream", step: FixedStep) -> tuple["torch.cuda.CUDAGraph", Tensor]:
        torch.cuda.synchronize(self._model.device)
        with torch.cuda.stream(stream):
            self._forward(step)  # compiles kernels and creates handles, which is not allowed during capture
            stream.synchronize()
        with _capturing(self._memory, stream) as graph:
            logits = self._forward(step)
        return graph, logits

    def _forward(self, step: FixedStep) -> Tensor:
        step.begin()
        return ROUTES[self._model.kind].fixed(self._model, step)


@contextmanager
def _capturing(memory: "torch.cuda._POOL_HANDLE", stream: "torch.cuda.Stream") -> Iterator["torch.cuda.CUDAGraph"]:
    """Capture what this thread launches on ``stream`` into a graph that uses the pool ``memory``. Raises RuntimeError with
    the first cause if the capture fails; the thread's current stream and the device's allocator are then restored."""
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream(stream.device)
    collects = gc.isenabled()
    gc.disable()  # a collection could unload a kernel or free memory, which is not allowed during capture
    try:
        # thread_local: another thread's calls do not break the capture
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            yield graph
    except Exception as error:
        # if CUDA ends a capture with an error, PyTorch leaves the stream current and its allocator in capture mode
        torch.cuda.set_stream(before)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, memory)
        raise RuntimeError(first_line(_first_cause(error))) from error
    finally:
        if collects:
            gc.enable()


def _first_cause(error: BaseException) -> BaseException:
    """Return the first error of the chain: ending a failed capture raises another error on top of it."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def graph_sizes(max_batch: int) -> list[int]:
    """Return the batch sizes that get a step: the powers of 2 below ``max_batch``, and ``max_batch``."""
    return [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch] + [max_batch]


def capture_graphs(
    model: LoadedModel, pool: KVPool, max_batch: int, streams: Sequence["torch.cuda.Stream"] | None = None
) -> tuple[DecodeGraphs | None, str]:
    """Return the decode graphs for ``streams`` (the current one if None or empty), or None if steps run without graphs;
    and a description or the reason, for the run's record."""
    if model.device.type != "cuda":
        return None, "none (CUDA graphs need a GPU)"
    if pool.kernels.decode is None:
        return None, "none (they need the compiled decode attention)"
    try:
        graphs = DecodeGraphs(model, pool, max_batch, streams or [torch.cuda.current_stream(model.device)])
    except Exception as error:  # whatever a model's forward or Triton raises, decode runs without graphs
        return None, f"none ({type(model.module).__name__} cannot be captured: {first_line(error)})"
    return graphs, f"for {', '.join(map(str, graph_sizes(max_batch)))} requests"
