"""Which device a name means."""

import pytest
import torch

from splitwiser.machine.device import resolve_device
from tests.support.assertions import refusal


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1"),
    ],
)  # fmt: skip
def test_a_name_means_a_device(name: str, gpus: int, expected: str) -> None:
    assert resolve_device(name, gpus) == torch.device(expected)


@pytest.mark.parametrize("name", ["gpu", "cpu:0", "cuda:x", "cuda:-1", ""])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    assert refusal(resolve_device, name, 9) == f"--device '{name}': must be auto, cpu, cuda or cuda:N"


def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert "finds no GPU here; use --device cpu" in refusal(resolve_device, "cuda", 0)
    assert refusal(resolve_device, "cuda:2", 2) == "--device 'cuda:2': there are 2 GPUs, numbered from 0"
