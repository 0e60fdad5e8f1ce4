"""Decode steps of fixed batch sizes, captured on a GPU as CUDA graphs and replayed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from splitwiser.engine.cuda_graphs import Graphs
from splitwiser.errors import first_line
from splitwiser.model.fixed_step import FixedDecodeStep
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import Segment
from splitwiser.model.routes import ROUTES


class DecodeGraphs(Graphs[FixedDecodeStep]):
    """Computes logits of decode steps for up to ``max_batch`` requests, with steps of fixed sizes (see :func:`graph_sizes`).

    Each step is captured as a CUDA graph for each of ``streams``; without streams, steps run without graphs. Raises
    :class:`~splitwiser.errors.UnsupportedModelError` for a mask that fixed steps cannot serve, and RuntimeError if a
    forward cannot be captured.
    """

    def __init__(
        self, model: LoadedModel, pool: KVPool, max_batch: int, streams: Sequence["torch.cuda.Stream"] = ()
    ) -> None:
        longest = model.longest_request
        width = pool.all_blocks if longest is None else min(pool.all_blocks, pool.blocks_for(longest))
        sizes = graph_sizes(max_batch)
        steps = [FixedDecodeStep(pool, size, width, model.device, sources=model.encodes) for size in sizes]
        super().__init__(model, steps, streams, "CUDA graphs of decode steps")

    @torch.inference_mode()
    def logits(self, segments: Sequence[Segment], tokens: Sequence[int]) -> Tensor:
        """Return the logits after each request's last token, shape (requests, vocabulary); the next call overwrites them.

        On a GPU the current stream must be one of ``streams``.
        """
        step = next(step for step in self._steps if step.size >= len(segments))
        step.load(segments, tokens)
        return self._run(step)[: len(segments)]

    def _forward(self, step: FixedDecodeStep) -> Tensor:
        step.begin()
        return ROUTES[self._model.kind].fixed(self._model, step)


def graph_sizes(max_batch: int) -> list[int]:
    """Return the batch sizes that get a step: the powers of 2 below ``max_batch``, and ``max_batch``."""
    return [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch] + [max_batch]


def capture_decode_graphs(
    model: LoadedModel, pool: KVPool, max_batch: int, streams: Sequence["torch.cuda.Stream"] = ()
) -> tuple[DecodeGraphs | None, str]:
    """Return the decode graphs for ``streams`` (the current one if empty), or None if steps run without graphs;
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
