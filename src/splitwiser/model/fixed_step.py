"""Steps of fixed sizes, whose inputs always lie in the same memory, as CUDA graphs need."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from splitwiser.errors import UnsupportedModelError
from splitwiser.model.attention import AttentionOptions, AttentionStep, Mask
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.paged_attention import Segment


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


class FixedDecodeStep(FixedStep):
    """A decode step of ``size`` requests with inputs in fixed buffers, where a captured graph reads those of each step.

    A smaller batch is padded by repeating its last request, which writes the same K and V again. ``tokens`` and
    ``positions`` are the inputs of the model, int64 of shape (size,); with ``sources``, each request's tokens begin with
    those of a source, which ``firsts`` counts.
    """

    firsts: Tensor

    def __init__(self, pool: KVPool, size: int, width: int, device: torch.device, *, sources: bool = False) -> None:
        super().__init__()
        self.size = size
        self.pool = pool
        self._members: list[Sequence[int]] = [()] * size
        self._host = torch.zeros(6 * size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(6 * size, dtype=torch.int64, device=device)
        self._staged = self._host.split(size)
        inputs = self._device.split(size)
        self.tokens, self.positions, self._slots, self.firsts, self._lengths, self.lora_numbers = inputs
        self._tables = torch.zeros(size, width, dtype=torch.int64, device=device)
        self._offsets = torch.arange(size + 1, device=device)
        self.rows = self._offsets[:-1]
        self._starts: dict[Mask, Tensor] = {}
        # before any request: one token in slot 0, which every request writes before it reads, and a source of another
        self.firsts.fill_(int(sources))
        self._lengths.fill_(1 + int(sources))

    def load(self, segments: Sequence[Segment], tokens: Sequence[int]) -> None:
        """Copy the next step's inputs into the buffers: one copy, and two for the block tables that changed."""
        repeated = self.size - len(segments)
        size = self.pool.block_tokens
        staged_tokens, positions, slots, firsts, lengths, loras = self._staged
        last = [segment.context - 1 for segment in segments]
        rows = (
            (staged_tokens, tokens),
            (positions, [segment.positions.start for segment in segments]),
            (slots, [each.blocks[at // size] * size + at % size for each, at in zip(segments, last, strict=True)]),
            (firsts, [segment.first for segment in segments]),
            (lengths, [segment.context for segment in segments]),
            (loras, [segment.lora for segment in segments]),
        )
        for staged, numbers in rows:
            staged.copy_(torch.tensor([*numbers, *[numbers[-1]] * repeated]))
        self._device.copy_(self._host, non_blocking=True)
        members = [segment.blocks for segment in segments]
        members += members[-1:] * repeated
        # a request that gets another block has another list of them
        changed = [row for row, (own, old) in enumerate(zip(members, self._members, strict=True)) if own is not old]
        if changed:
            self._load_tables(changed, [members[row] for row in changed])
            self._members = members

    def _load_tables(self, rows: Sequence[int], blocks: Sequence[Sequence[int]]) -> None:
        """Write the block tables of ``rows``, the columns that are in use; the rest is never read."""
        most = max(map(len, blocks))
        columns, places = torch.tensor([[*row, *[0] * (most - len(row))] for row in blocks]), torch.tensor(rows)
        if self._tables.is_cuda:
            columns, places = (
                each.pin_memory().to(self._tables.device, non_blocking=True) for each in (columns, places)
            )
        self._tables[places, :most] = columns

    def begin(self) -> None:
        """See :meth:`FixedStep.begin`."""
        self._starts.clear()

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See :meth:`splitwiser.model.attention.AttentionStep.store`."""
        self.pool.write(layer, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """See :meth:`splitwiser.model.attention.AttentionStep.attend`."""
        assert isinstance(mask, Mask)
        starts = self._first_seen(mask)
        return self.attend_between(query, self.attended_layer(key), starts, self._lengths, options)

    def attend_between(
        self, query: Tensor, layer: int, starts: Tensor, ends: Tensor, options: AttentionOptions
    ) -> Tensor:
        """Attend from ``query`` (1, heads, size, key size) at ``layer`` of the pool over each request's tokens from number
        ``starts`` to before ``ends``, int64 of shape (size,). Returns (1, size, heads, value size)."""
        assert self.pool.kernels.decode is not None
        return self.pool.kernels.decode(
            query[0].transpose(0, 1), self.pool.keys[layer], self.pool.values[layer], self._tables, starts, self._offsets,
            ends, options.scaling, options.softcap, options.sinks, options.bias, options.bias_by_position,
        ).unsqueeze(0)  # fmt: skip

    def _first_seen(self, mask: Mask) -> Tensor:
        """Return the first position that each token attends to, int64 of shape (size,). Computed once for all layers: for a
        sliding window it takes about ten kernels over all positions."""
        if mask.is_causal:
            return self.firsts
        if mask not in self._starts:
            positions = torch.arange(self._tables.shape[1] * self.pool.block_tokens, device=self._lengths.device)
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
