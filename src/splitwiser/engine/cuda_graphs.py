"""Steps of fixed sizes, captured on a GPU as CUDA graphs and replayed.

A replayed step is one launch instead of hundreds, and launches are what limits small models on a GPU. A graph runs on the
multiprocessors of the stream that it was captured on, so each stream that a step may use has its own graphs.
"""

import gc
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from splitwiser.errors import first_line
from splitwiser.model.attention import AttentionStep
from splitwiser.model.forward import forward
from splitwiser.model.loading import LoadedModel


class FixedStep(AttentionStep):
    """A step of a fixed ``size`` with inputs in fixed buffers, where a captured graph reads those of each step: ``tokens``
    and ``positions`` (tokens,), the ``rows`` whose logits are kept, and the ``lora_numbers`` of the tokens' adapters; int64
    each, on the model's device."""

    size: int
    tokens: Tensor
    positions: Tensor
    rows: Tensor
    lora_numbers: Tensor

    @property
    def loras(self) -> Tensor:
        """See :attr:`splitwiser.model.attention.AttentionStep.loras`: always numbers, since a graph reads them."""
        return self.lora_numbers

    @abstractmethod
    def begin(self) -> None:
        """Forget what layers shared in the previous forward."""


Step = TypeVar("Step", bound=FixedStep)


class Graphs(Generic[Step]):
    """Computes the logits of ``steps``, which are in ascending order of their sizes.

    Each step is captured as a CUDA graph for each of ``streams``; without streams, steps run without graphs. Raises
    RuntimeError if a forward cannot be captured.
    """

    def __init__(
        self, model: LoadedModel, steps: Sequence[Step], streams: Sequence["torch.cuda.Stream"], desc: str
    ) -> None:
        self._model = model
        self._steps = steps
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
        for stream, step in tqdm(work, desc=desc, unit="graph", disable=None, leave=False):
            captured = self._capture(aside if stream == default else stream, step)
            self._graphs[stream.cuda_stream, step.size] = captured

    def _run(self, step: Step) -> Tensor:
        """Return the logits of ``step``, whose inputs are loaded, shape (its rows, vocabulary); the next call overwrites
        them. On a GPU the current stream must be one of ``streams``."""
        if not self._graphs:
            return self._forward(step)
        graph, logits = self._graphs[torch.cuda.current_stream(self._model.device).cuda_stream, step.size]
        graph.replay()
        return logits

    @torch.inference_mode()
    def _capture(self, stream: "torch.cuda.Stream", step: Step) -> tuple["torch.cuda.CUDAGraph", Tensor]:
        torch.cuda.synchronize(self._model.device)
        with torch.cuda.stream(stream):
            self._forward(step)  # compiles kernels and creates handles, which is not allowed during capture
            stream.synchronize()
        with _capturing(self._memory, stream) as graph:
            logits = self._forward(step)
        return graph, logits

    def _forward(self, step: Step) -> Tensor:
        step.begin()
        return forward(self._model.module, step, step.tokens, step.positions, step.rows)


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
