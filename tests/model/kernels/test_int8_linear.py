"""Layers of int8 weights: the same numbers by the compiled product and by PyTorch's, near those of bfloat16."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from splitwiser.machine.shared_memory import SharedModule
from splitwiser.model.kernels import int8_linear as int8
from splitwiser.model.kernels.int8_linear import Int8Linear, quantise_linears
from splitwiser.model.kernels.packed_linear import IDENTITY, RELU, PackedLinear, find_packing_problem

pytestmark = pytest.mark.skipif(find_packing_problem() is not None, reason=f"cannot pack: {find_packing_problem()}")
needs_product = pytest.mark.skipif(int8._functions() is None, reason="this processor has no products of int8 quads")

SIZES = [(64, 128), (48, 96), (40, 100), (577, 130), (576, 1), (3, 65), (3072, 64)]


def linear(sizes: tuple[int, int], bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*sizes, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


def inputs(*shape: int) -> torch.Tensor:
    """Rows of very different sizes."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return (numbers * torch.logspace(-3, 2, shape[-2])[:, None]).to(torch.bfloat16)


def test_inputs_of_another_width_are_refused() -> None:
    layer = Int8Linear(PackedLinear(linear((48, 96))))  # 6 rows of 64 are as many numbers as 8 of 48
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inputs have width 64, and the layer has 48"):
        layer(inputs(6, 64))


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[PackedLinear], Int8Linear]:
    """Makes layers that PyTorch computes."""

    def make(packed: PackedLinear) -> Int8Linear:
        monkeypatch.setattr(int8, "_functions", lambda: None)
        return Int8Linear(packed)

    return make


@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
def test_a_row_keeps_its_numbers_to_two_digits_whatever_its_size(sizes: tuple[int, int]) -> None:
    plain, rows = linear(sizes, bias=False), inputs(9, sizes[0])
    with torch.inference_mode():
        made, expected = Int8Linear(PackedLinear(plain))(rows).float(), plain(rows).float()
    assert ((made - expected).norm(dim=-1) < 0.02 * expected.norm(dim=-1)).all()


@needs_product
@pytest.mark.parametrize("activation", [IDENTITY, RELU, ("gelu", "none"), ("gelu", "tanh"), ("swish", "")])
@pytest.mark.parametrize("count", [1, 6, 97])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_compiled_product_gives_pytorchs_numbers(
    sizes: tuple[int, int], count: int, activation: tuple[str, str], plainly: Callable[[PackedLinear], Int8Linear]
) -> None:
    packed, rows = PackedLinear(linear(sizes)).with_activation(activation), inputs(count, sizes[0])
    with torch.inference_mode():
        made = Int8Linear(packed)(rows)
        expected = plainly(packed)(rows)
    assert made.shape == expected.shape == (count, sizes[1])
    torch.testing.assert_close(made, expected, rtol=1 / 64, atol=1e-5)  # one rounding may differ


@needs_product
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    layer, rows = Int8Linear(PackedLinear(linear((96, 200)))), inputs(100, 96)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        made = layer(rows)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made, layer(rows))


def test_a_residual_is_added_before_rounding(plainly: Callable[[PackedLinear], Int8Linear]) -> None:
    packed, rows = PackedLinear(linear((48, 96))), inputs(1, 7, 48)
    residual = inputs(1, 7, 96)
    made = Int8Linear(packed).added_to(residual, rows)
    assert made.shape == (1, 7, 96)
    torch.testing.assert_close(made, plainly(packed).added_to(residual, rows), rtol=1 / 64, atol=1e-5)


def test_a_row_of_zeros_gives_the_bias() -> None:
    plain = linear((48, 96))
    made = Int8Linear(PackedLinear(plain))(torch.zeros(2, 48, dtype=torch.bfloat16))
    assert torch.equal(made, plain.bias.expand(2, 96))


def test_rows_do_not_change_each_other() -> None:
    layer, rows = Int8Linear(PackedLinear(linear((48, 96)))), inputs(9, 48)
    assert torch.equal(torch.cat([layer(row[None]) for row in rows]), layer(rows))


def test_a_layer_takes_half_the_bytes() -> None:
    packed = PackedLinear(linear((512, 1024)))
    assert sum(each.nbytes for each in Int8Linear(packed).buffers()) < 0.52 * packed.packed.nbytes


def test_processes_share_the_weights() -> None:
    layer, rows = Int8Linear(PackedLinear(linear((48, 96)))), inputs(3, 48)
    expected = layer(rows)
    shared = SharedModule(nn.Sequential(layer), torch.device("cpu"))
    assert torch.equal(layer(rows), expected)  # its weights have moved
    assert torch.equal(shared.open()(rows), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(rows), expected)


def test_all_packed_layers_are_replaced_wherever_they_are() -> None:
    packed = [PackedLinear(linear((48, 96))) for _ in range(2)]
    module = nn.Sequential(packed[0], nn.ReLU(), nn.Sequential(packed[1], nn.Linear(96, 2)))
    assert quantise_linears(module) == 2
    assert [type(each) for each in module.modules()].count(Int8Linear) == 2
    assert type(module.get_submodule("2.1")) is nn.Linear
