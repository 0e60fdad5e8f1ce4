"""Decode steps of fixed batch sizes, captured on a GPU as CUDA graphs and replayed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from splitwiser.engine.cuda_graphs import FixedStep, Graphs
from splitwiser.errors import UnsupportedModelError, first_line
from splitwiser.model.attention import AttentionOptions, Mask
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import Segment


class _FixedStep(FixedStep):
    """A decode step of ``size`` requests with inputs in fixed buffers, where a captured graph reads those of each step.

    A smaller batch is padded by repeating its last request, which writes the same K and V again.
    """

    def __init__(self, pool: KVPool, size: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.size = size
        self._pool = pool
        self._members: list[Sequence[int]] = []
        self._host = torch.zeros(5 * size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(5 * size, dtype=torch.int64, device=device)
        self._staged = self._host.split(size)
        self.tokens, self.positions, self._slots, self._lengths, self.lora_numbers = self._device.split(size)
        self._tables = torch.zeros(size, width, dtype=torch.int64, device=device)
        self._offsets = torch.arange(size + 1, device=device)
        self.rows = self._offsets[:-1]
        self._first = torch.zeros(
            size, dtype=torch.int64, device=device
        )  # first position that each token attends to, if causal
        self._starts: dict[Mask, Tensor] = {}
        self._lengths.fill_(1)  # before any request: one token in slot 0, which every request writes before it reads

    def load(self, segments: Sequence[Segment], tokens: Sequence[int]) -> None:
        """Copy the next step's inputs into the buffers: one copy, and a second for the block tables if the batch changed."""
        repeated = self.size - len(segments)
        size = self._pool.block_tokens
        staged_tokens, positions, slots, lengths, loras = self._staged
        last = [segment.context - 1 for segment in segments]
        rows = (
            (staged_tokens, tokens),
            (positions, last),
            (slots, [each.blocks[at // size] * size + at % size for each, at in zip(segments, last, strict=True)]),
            (lengths, [segment.context for segment in segments]),
            (loras, [segment.lora for segment in segments]),
        )
        for staged, numbers in rows:
            staged.copy_(torch.tensor([*numbers, *[numbers[-1]] * repeated]))
        self._device.copy_(self._host, non_blocking=True)
        members = [segment.blocks for segment in segments]
        if [*map(id, members)] != [*map(id, self._members)]:  # a request keeps its blocks: tables change with the batch
            self._load_tables([*members, *members[-1:] * repeated])
            self._members = members

    def _load_tables(self, blocks: Sequence[Sequence[int]]) -> None:
        """Write the block tables' columns that are in use; the rest is never read."""
        most = max(map(len, blocks))
        columns = torch.tensor([[*row, *[0] * (most - len(row))] for row in blocks])
        if self._tables.is_cuda:
            columns = columns.pin_memory().to(self._tables.device, non_blocking=True)
        self._tables[:, :most] = columns

    def begin(self) -> None:
        """Forget the masks of the previous forward."""
        self._starts.clear()

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See :meth:`splitwiser.model.attention.AttentionStep.store`."""
        self._pool.write(layer, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """See :meth:`splitwiser.model.attention.AttentionStep.attend`."""
        assert self._pool.kernels.decode is not None
        assert isinstance(mask, Mask)
        first_seen, layer = self._first_seen(mask), self.attended_layer(key)
        return self._pool.kernels.decode(
            query[0].transpose(0, 1), self._pool.keys[layer], self._pool.values[layer],
            self._tables, first_seen, self._offsets, self._lengths,
            options.scaling, options.softcap, options.sinks, options.bias, options.bias_by_position,
        ).unsqueeze(0)  # fmt: skip

    def _first_seen(self, mask: Mask) -> Tensor:
        """Return the first position that each token attends to, int64 of shape (size,). Computed once for all layers: for a
        sliding window it takes about ten kernels over all positions."""
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
    """Refuse a mask that is not "every position from some first one on", which a start position cannot express."""
    asked = positions[:: max(1, len(positions) // 64), None]
    seen = mask(asked, positions[None]) & (positions[None] <= asked)
    first = asked[:, 0] + 1 - seen.sum(dim=-1)
    if not bool((seen == ((positions[None] >= first[:, None]) & (positions[None] <= asked))).all()):
        raise UnsupportedModelError("a mask with holes")


class DecodeGraphs(Graphs[_FixedStep]):
    """Computes logits of decode steps for up to ``max_batch`` requests, with steps of fixed sizes (see :func:`graph_sizes`).

    Each step is captured as a CUDA graph for each of ``streams``; without streams, steps run without graphs. Raises
    :class:`~splitwiser.errors.UnsupportedModelError` for a mask that fixed steps cannot serve, and RuntimeError if a
    forward cannot be captured.
    """

    def __init__(
        self, model: LoadedModel, pool: KVPool, max_batch: int, streams: Sequence["torch.cuda.Stream"] = ()
    ) -> None:
        most = pool.all_blocks
        width = most if model.max_positions is None else min(most, pool.blocks_for(model.max_positions))
        steps = [_FixedStep(pool, size, width, model.device) for size in graph_sizes(max_batch)]
        super().__init__(model, steps, streams, "CUDA graphs of decode steps")

    @torch.inference_mode()
    def logits(self, segments: Sequence[Segment], tokens: Sequence[int]) -> Tensor:
        """Return the logits after each request's last token, shape (requests, vocabulary); the next call overwrites them.

        On a GPU the current stream must be one of ``streams``.
        """
        step = next(step for step in self._steps if step.size >= len(segments))
        step.load(segments, tokens)
        return self._run(step)[: len(segments)]


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
