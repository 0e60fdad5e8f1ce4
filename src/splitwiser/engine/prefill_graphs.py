"""Prefill steps of fixed numbers of tokens, captured on a GPU as CUDA graphs and replayed.

A step of a small model's layers takes longer to launch than to compute: docs/benchmarks.md, "On a GPU", has both times on an
H100, and the probe ``prefill_graphs`` of scripts/gpu_probe.py measures them.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from splitwiser.engine.cuda_graphs import Graphs
from splitwiser.errors import UnsupportedModelError, first_line
from splitwiser.model.attention import AttentionOptions, Mask
from splitwiser.model.fixed_step import FixedStep
from splitwiser.model.forward import forward
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import PagedAttention, Segment, first_seen, window_of
from splitwiser.model.trials import logits_agree

MAX_PROMPTS = 16  # in one step; attention launches programs for this many, whether they have work or not
SMALLEST = 128  # tokens; smaller steps take as long, since they read all weights too
LARGEST = 8192  # tokens; larger steps compute for so long that launches do not count
_TRIED = (5, 11)  # lengths of the prompts by which graphs are tried
PARTS = 8  # at most an eighth of the largest step is padding


class _FixedPrompts(FixedStep):
    """A prefill step of ``size`` tokens of at most :data:`MAX_PROMPTS` whole prompts.

    The tokens that are missing are those of one more prompt of zeros, whose K and V all go to the slot after a prompt's last
    token: decode writes there before it reads.
    """

    def __init__(self, pool: KVPool, size: int, device: torch.device) -> None:
        super().__init__()
        self.size = size
        self._pool = pool
        self._windows: dict[int, int | None] = {}
        sizes = [size, size, size, size, MAX_PROMPTS, MAX_PROMPTS + 2]
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._staged = self._host.split(sizes)
        self.tokens, self.positions, self._slots, self.lora_numbers, self.rows, self._ends = self._device.split(sizes)
        self._counted = torch.arange(max(size, pool.block_tokens))
        # before any request: one prompt, at slot 0, which every request writes before it reads
        self._staged[-1][-1] = self._ends[-1] = size
        self._offsets = self._ends.to(torch.int32)

    def load(self, segments: Sequence[Segment], tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Copy the next step's inputs into the buffers, in one copy. Only for segments that :meth:`has_room_for`."""
        staged_tokens, positions, slots, loras, staged_rows, staged_ends = self._staged
        ends = list(itertools.accumulate((segment.tokens for segment in segments), initial=0))
        # as tensors where it can be: to go through thousands of numbers in Python takes as long as to compute with them
        for segment, start, end in zip(segments, ends, ends[1:], strict=False):
            positions[start:end] = self._counted[: segment.tokens]
            blocks = torch.tensor(segment.blocks[: self._pool.blocks_for(segment.tokens)])
            in_blocks = blocks[:, None] * self._pool.block_tokens + self._counted[: self._pool.block_tokens]
            slots[start:end] = in_blocks.flatten()[: segment.tokens]
            loras[start:end] = segment.lora
        if (missing := self.size - len(tokens)) > 0:
            staged_tokens[-missing:] = 0
            positions[-missing:] = self._counted[:missing]
            slots[-missing:] = self._spare_slot(segments)
            loras[-missing:] = 0
        staged_tokens[: len(tokens)] = torch.tensor(tokens)
        staged_rows[: len(rows)] = torch.tensor(rows)
        staged_ends[:-1] = torch.tensor([*ends, *ends[-1:] * (MAX_PROMPTS - len(segments))])
        self._device.copy_(self._host, non_blocking=True)

    def has_room_for(self, segments: Sequence[Segment]) -> bool:
        """Whether ``segments`` are prompts whose tokens are all new and which fit into this step."""
        tokens = sum(segment.tokens for segment in segments)
        return (
            len(segments) <= MAX_PROMPTS
            and all(segment.tokens == segment.context for segment in segments)
            and (tokens == self.size or (tokens < self.size and self._spare_slot(segments) is not None))
        )

    def _spare_slot(self, segments: Sequence[Segment]) -> int | None:
        """Return the slot after a prompt's last token, of the first prompt whose blocks have one."""
        size = self._pool.block_tokens
        for segment in segments:
            block, place = divmod(segment.context, size)
            if block < len(segment.blocks):
                return segment.blocks[block] * size + place
        return None

    def begin(self) -> None:
        """See :meth:`splitwiser.model.fixed_step.FixedStep.begin`."""
        self._offsets = self._ends.to(torch.int32)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See :meth:`splitwiser.model.attention.AttentionStep.store`."""
        self._pool.write(layer, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))

    def lengths(self, positions: Tensor) -> Tensor:
        """See :meth:`splitwiser.model.attention.AttentionStep.lengths`; each prompt is whole in the step."""
        following = torch.searchsorted(self._ends, torch.arange(self.size, device=positions.device), right=True)
        lengths: Tensor = self._ends[following] - self._ends[following - 1]
        return lengths.view_as(positions)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """See :meth:`splitwiser.model.attention.AttentionStep.attend`. Raises :class:`UnsupportedModelError` for a mask or
        options that the kernel does not take."""
        assert self._pool.kernels.varlen is not None
        assert isinstance(mask, Mask)
        if not options.fits_varlen:
            raise UnsupportedModelError("its attention has options that the variable-length kernel does not take")
        window = self._window(mask, self.attended_layer(key))
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        offsets, longest = (self._offsets, self._offsets), (self.size, self.size)
        return self._pool.kernels.varlen(query, key, value, offsets, longest, window, options.scaling).unsqueeze(0)

    def _window(self, mask: Mask, layer: int) -> int | None:
        """Return the sliding window of attention to ``layer``, None for a causal mask. Found in the forward before a
        capture, which may not ask the device for numbers."""
        if mask.is_causal:
            return None
        if layer not in self._windows:
            positions = torch.arange(self.size, device=self.tokens.device)
            starts = first_seen(mask, positions)
            window = None if starts is None else window_of(starts, positions)
            if window is None:
                raise UnsupportedModelError("a mask that is no sliding window")
            self._windows[layer] = window
        return self._windows[layer]


class PrefillGraphs(Graphs[_FixedPrompts]):
    """Computes logits of prefill steps of up to ``budget`` tokens, with steps of fixed sizes (see :func:`prefill_sizes`).

    Each step is captured as a CUDA graph for each of ``streams``; without streams, steps run without graphs. Raises
    :class:`~splitwiser.errors.UnsupportedModelError` for an attention that fixed steps cannot serve, and RuntimeError if a
    forward cannot be captured.
    """

    def __init__(
        self, model: LoadedModel, pool: KVPool, budget: int, streams: Sequence["torch.cuda.Stream"] = ()
    ) -> None:
        steps = [_FixedPrompts(pool, size, model.device) for size in prefill_sizes(budget)]
        super().__init__(model, steps, streams, "CUDA graphs of prefill steps")

    @torch.inference_mode()
    def logits(self, segments: Sequence[Segment], tokens: Sequence[int], rows: Sequence[int]) -> Tensor | None:
        """Return the logits of ``rows`` of the packed ``tokens``, shape (rows, vocabulary); the next call overwrites them.
        None if no fixed step takes ``segments``: too many, too long, or a prompt that an earlier step began.

        On a GPU the current stream must be one of ``streams``.
        """
        step = next((step for step in self._steps if step.size >= len(tokens)), None)
        if step is None or not step.has_room_for(segments):
            return None
        step.load(segments, tokens, rows)
        return self._run(step)[: len(rows)]

    def find_difference(self, pool: KVPool) -> str | None:
        """Return why the graphs do not serve: their logits for two prompts differ from those of a step without graphs. None
        if they are the same. Overwrites the pool's first blocks."""
        model = self._model
        prompts = [[(7 * number + 3) % model.vocabulary for number in range(length)] for length in _TRIED]
        each = pool.blocks_for(_TRIED[-1] + 1)  # with a slot for what is missing in the step
        segments = [
            Segment(range(number * each, (number + 1) * each), len(prompt), len(prompt))
            for number, prompt in enumerate(prompts)
        ]
        tokens = [token for prompt in prompts for token in prompt]
        positions = [at for segment in segments for at in segment.positions]
        rows = [end - 1 for end in itertools.accumulate(segment.tokens for segment in segments)]
        for step in {self._steps[0].size: self._steps[0], self._steps[-1].size: self._steps[-1]}.values():
            with torch.inference_mode():
                expected = forward(model.module, PagedAttention(pool, segments, model.device), tokens, positions, rows)
                step.load(segments, tokens, rows)
                made = self._run(step)[: len(rows)]
            if not logits_agree(made, expected, model.dtype):
                return f"the logits of a step of {step.size} tokens differ from those without graphs"
        return None


def prefill_sizes(budget: int) -> list[int]:
    """Return the numbers of tokens that get a step: powers of 2 from :data:`SMALLEST`, then :data:`PARTS` equal steps up to
    ``budget`` or :data:`LARGEST`."""
    largest = min(budget, LARGEST)
    part = -(-largest // PARTS)
    powers = itertools.takewhile(lambda size: size < part, (SMALLEST << power for power in itertools.count()))
    return [*powers, *(min(size, largest) for size in range(part, largest + part, part) if size >= SMALLEST)] or [
        largest
    ]


def capture_prefill_graphs(
    model: LoadedModel, pool: KVPool, budget: int, streams: Sequence["torch.cuda.Stream"] = ()
) -> tuple[PrefillGraphs | None, str]:
    """Return the prefill graphs for ``streams`` (the current one if empty), or None if steps run without graphs; and a
    description or the reason, for the run's record. Overwrites the pool's first blocks."""
    if model.device.type != "cuda":
        return None, "none (CUDA graphs need a GPU)"
    if model.encodes:
        return None, "none (they are for decoders)"
    if pool.kernels.varlen is None:
        return None, "none (they need the variable-length attention)"
    if pool.blocks < len(_TRIED) * pool.blocks_for(_TRIED[-1] + 1):
        return None, "none (the KV pool has too few blocks to try them)"
    try:
        streams = streams or [torch.cuda.current_stream(model.device)]
        graphs = PrefillGraphs(model, pool, budget, streams)
        with torch.cuda.stream(streams[0]):
            problem = graphs.find_difference(pool)
        if problem:
            return None, f"none ({problem})"
    except Exception as error:  # whatever a model's forward raises, prefill runs without graphs
        return None, f"none ({type(model.module).__name__} cannot be captured: {first_line(error)})"
    return graphs, f"for {', '.join(map(str, prefill_sizes(budget)))} tokens of up to {MAX_PROMPTS} whole prompts"
