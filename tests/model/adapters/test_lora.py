"""Linear layers that add LoRA parts row by row."""

import torch
from torch import nn

from splitwiser.model.adapters.loaded import LoraPart
from splitwiser.model.adapters.lora import LoraLinear, add_lora
from splitwiser.model.attention import AttentionStep, serving


class Step(AttentionStep):
    """A step whose tokens have these adapters."""

    def __init__(self, loras: list[int]) -> None:
        super().__init__()
        self._loras = torch.tensor(loras)

    @property
    def loras(self) -> torch.Tensor:
        return self._loras

    def store(self, *_: object) -> None:
        raise NotImplementedError

    def attend(self, *_: object) -> torch.Tensor:
        raise NotImplementedError


def part(rank: int, scaling: float) -> LoraPart:
    return LoraPart(torch.randn(rank, 6), torch.randn(5, rank), scaling)


def test_each_row_gets_its_own_adapters_part() -> None:
    torch.manual_seed(0)
    base, parts, rows = nn.Linear(6, 5), {1: part(2, 0.5), 3: part(4, 2.0)}, torch.randn(1, 5, 6)
    layer = LoraLinear(base, parts)
    numbers = [3, 0, 1, 2, 3]  # adapter 2 has no part of this layer
    with torch.inference_mode(), serving(Step(numbers)):
        output = layer(rows)[0]
        for row, number in enumerate(numbers):
            expected = base(rows[0, row])
            if number in parts:
                own = parts[number]
                expected = expected + own.scaling * (own.up @ (own.down @ rows[0, row]))
            torch.testing.assert_close(output[row], expected)


def test_outside_of_a_step_the_layer_is_the_base() -> None:
    base, rows = nn.Linear(6, 5), torch.randn(2, 3, 6)
    torch.testing.assert_close(LoraLinear(base, {1: part(2, 1.0)})(rows), base(rows))


def test_only_layers_with_parts_are_wrapped() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(6, 5)))
    add_lora(module, [{"0": part(2, 1.0)}, {"0": part(3, 1.0)}])
    assert isinstance(module[0], LoraLinear)
    assert module[0].owners.tolist() == [1, 1, 2, 2, 2]
    assert isinstance(module.get_submodule("1.0"), nn.Linear)
