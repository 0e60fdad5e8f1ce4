"""The compiled attention against attention written out in float32, over all that its code treats apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from splitwiser.model.kernels.build import load_native
from splitwiser.model.kernels.cpu_attention import CpuAttention, CpuStore, load_cpu_kernels
from splitwiser.model.kernels.interface import LayerShape
from splitwiser.model.kernels.stored import dequantise, quantise

LIBRARY, WHY_NOT = load_native()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=WHY_NOT)
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
POOLS = [*BOUNDS, torch.int8]

# (heads, kv heads, key size, value size): usual ones, and sizes that fill no vector
SHAPES = [
    (4, 4, 64, 64), (9, 3, 64, 64), (4, 1, 80, 80), (4, 2, 96, 64), (6, 2, 40, 48), (10, 2, 24, 32), (5, 1, 256, 256),
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 37},
    "soft-cap": {"softcap": 3.0},
    "sinks": {"has_sinks": True},
    "bias by distance": {"biases": 70},
    "bias by position": {"biases": 320, "bias_by_position": True},
    "all": {"window": 5, "softcap": 2.0, "has_sinks": True, "biases": 3},
    "odd blocks": {"block": 7},
}


@dataclass
class Case:
    """Requests of some lengths, their last ``new`` tokens to attend from, and where all of them lie."""

    query: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    starts: Tensor
    lengths: Tensor
    offsets: Tensor
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None
    bias_by_position: bool

    @property
    def scaling(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    def attend(self) -> Tensor:
        """What the compiled function makes of it."""
        assert LIBRARY is not None
        return CpuAttention(LIBRARY)(
            self.query,
            self.keys,
            self.values,
            self.tables,
            self.starts,
            self.offsets,
            self.lengths,
            self.scaling,
            self.softcap,
            self.sinks,
            self.bias,
            self.bias_by_position,
        )

    def written_out(self) -> Tensor:
        """What it should make of it."""
        group = self.query.shape[1] // self.keys.shape[2]
        outputs = []
        for row, length in enumerate(self.lengths.tolist()):
            first, last = self.offsets[row : row + 2].tolist()
            keys, values = (
                (dequantise(kept) if kept.dtype == torch.int8 else kept.float()).repeat_interleave(group, dim=1)
                for kept in (stored[self.tables[row]].flatten(0, 1)[:length] for stored in (self.keys, self.values))
            )
            scores = torch.einsum("qhd,khd->hqk", self.query[first:last].float(), keys) * self.scaling
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            positions = torch.arange(length)
            own = positions[length - (last - first) :, None]
            if self.bias is not None:
                entries = positions.expand(len(own), -1) if self.bias_by_position else (own - positions).clamp(min=0)
                scores = scores + self.bias[:, entries.clamp(max=self.bias.shape[1] - 1)]
            seen = (positions <= own) & (positions >= self.starts[first:last, None])
            scores = scores.masked_fill(~seen, -math.inf)
            if self.sinks is not None:
                scores = torch.cat([scores, self.sinks.view(-1, 1, 1).expand(-1, last - first, 1)], dim=-1)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], values))
        return torch.cat(outputs)


def make_case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    lengths: Sequence[int],
    new: Sequence[int],
    *,
    window: int | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
    biases: int = 0,
    bias_by_position: bool = False,
    block: int = 16,
) -> Case:
    heads, kv_heads, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    needs = [-(-length // block) for length in lengths]
    order = torch.randperm(sum(needs) + 3, generator=generator)
    tables = torch.zeros(len(lengths), max(needs), dtype=torch.long)
    for row, blocks in enumerate(order[: sum(needs)].split(needs)):
        tables[row, : len(blocks)] = blocks

    def drawn(*size: int) -> Tensor:
        numbers = torch.randn(*size, generator=generator)
        return quantise(numbers) if dtype == torch.int8 else numbers.to(dtype)

    is_int8 = dtype == torch.int8
    positions = torch.cat([torch.arange(length - few, length) for length, few in zip(lengths, new, strict=True)])
    return Case(
        query=torch.randn(sum(new), heads, key_dim, generator=generator).to(torch.bfloat16 if is_int8 else dtype),
        keys=drawn(len(order), block, kv_heads, key_dim),
        values=drawn(len(order), block, kv_heads, value_dim),
        tables=tables,
        starts=torch.zeros_like(positions) if window is None else (positions - window + 1).clamp(min=0),
        lengths=torch.tensor(lengths),
        offsets=torch.tensor([0, *new]).cumsum(0),
        softcap=softcap,
        sinks=torch.randn(heads, generator=generator) if has_sinks else None,
        bias=2 * torch.randn(heads, biases, generator=generator) if biases else None,
        bias_by_position=bias_by_position,
    )


def check(case: Case) -> None:
    bound = BOUNDS[case.query.dtype]
    torch.testing.assert_close(case.attend().float(), case.written_out(), atol=bound, rtol=bound)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", POOLS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_new_token_a_request(shape: tuple[int, int, int, int], option: str, dtype: torch.dtype) -> None:
    check(make_case(shape, dtype, [1, 5, 64, 252, 700], [1] * 5, **OPTIONS[option]))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        pytest.param([7, 64, 65, 150, 400], [7, 64, 65, 150, 400], id="whole prompts"),
        pytest.param([300, 400, 33, 70], [100, 37, 1, 1], id="the rest of prompts"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_several_new_tokens_a_request(
    shape: tuple[int, int, int, int], option: str, dtype: torch.dtype, lengths: list[int], new: list[int]
) -> None:
    layer = LayerShape(shape[1], shape[2], shape[3])
    kernels, described = load_cpu_kernels(dtype, [layer])
    if kernels.prefill is None:
        pytest.skip(described["prefill_attention"])
    check(make_case(shape, dtype, lengths, new, **OPTIONS[option]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefill_of_other_types_is_left_to_pytorch(dtype: torch.dtype) -> None:
    kernels, described = load_cpu_kernels(dtype, [LayerShape(2, 64, 64)])
    assert kernels.decode is not None
    assert kernels.prefill is None
    assert "scaled_dot_product_attention" in described["prefill_attention"]


def test_prefill_of_a_size_that_it_does_not_take_is_left_to_pytorch() -> None:
    kernels, _ = load_cpu_kernels(torch.bfloat16, [LayerShape(2, 64, 64), LayerShape(2, 64, 40)])
    assert kernels.prefill is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_tokens_are_added_up_alike_by_any_number_of_threads(dtype: torch.dtype) -> None:
    case, made, threads = make_case((9, 3, 64, 64), dtype, [1500, 3], [1, 1]), [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        made.append(case.attend())
    torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("dtype", POOLS, ids=str)
def test_tokens_of_which_hardly_anything_is_seen_do_no_harm(dtype: torch.dtype) -> None:
    case = make_case((4, 2, 64, 64), dtype, [96], [1], biases=96, bias_by_position=True)
    case.bias = -torch.arange(96.0).expand(4, 96).contiguous()  # weights down to e^-95, less than float32's smallest
    check(case)


def test_queries_between_other_numbers_are_read_where_they_lie() -> None:
    case = make_case((4, 2, 32, 32), torch.bfloat16, [40, 9], [1, 1])
    expected = case.attend()
    case.query = torch.cat([case.query, torch.full_like(case.query, math.nan)], dim=1)[:, :4]
    torch.testing.assert_close(case.attend(), expected, atol=0, rtol=0)


@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_stores_each_token_in_its_slot(dtype: torch.dtype, tokens: int) -> None:
    assert LIBRARY is not None
    slots = torch.randperm(128)[:tokens]
    both = torch.randn(tokens, 2, 2 * 24).to(dtype)  # keys and values side by side, so neither is contiguous
    keys, values = both[..., :24], both[..., 24:]
    layer = [torch.zeros(8, 16, 2, 24, dtype=dtype) for _ in range(2)]
    CpuStore(LIBRARY)(layer[0], layer[1], slots, keys, values)
    for stored, given in zip(layer, (keys, values), strict=True):
        expected = torch.zeros(128, 2, 24, dtype=dtype)
        expected[slots] = given
        torch.testing.assert_close(stored.flatten(0, 1), expected, atol=0, rtol=0)


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_stores_int8_as_pytorch_makes_it(dtype: torch.dtype, tokens: int) -> None:
    assert LIBRARY is not None
    slots = torch.randperm(128)[:tokens]
    both = torch.randn(tokens, 2, 24 + 32).to(dtype)
    both[0, 1] = 0
    given = both[..., :24], both[..., 24:]
    layer = [torch.zeros(8, 16, 2, size + 4, dtype=torch.int8) for size in (24, 32)]
    CpuStore(LIBRARY)(layer[0], layer[1], slots, *given)
    for stored, numbers in zip(layer, given, strict=True):
        expected = torch.zeros(128, 2, stored.shape[3], dtype=torch.int8)
        expected[slots] = quantise(numbers)
        differences = (stored.flatten(0, 1).int() - expected.int())[..., :-4]
        assert differences.abs().max() <= 1  # what lies half-way between two whole numbers may become either
        assert differences.count_nonzero() < 0.01 * differences.numel()
        assert torch.equal(stored.flatten(0, 1)[..., -4:], expected[..., -4:])
