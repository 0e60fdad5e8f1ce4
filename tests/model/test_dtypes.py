"""The spellings of number formats."""

import pytest
import torch

from splitwiser.config import RunConfig
from splitwiser.model.checkpoints.configuration import DTYPES
from splitwiser.model.dtypes import SPELLINGS, dtype_name
from tests.support.assertions import refusal


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("float", "float32"), ("fp32", "float32"), ("bf16", "bfloat16"), ("half", "float16"), ("fp16", "float16"),
        ("auto", "auto"), ("torch.bfloat16", "bfloat16"), (torch.float16, "float16"),
    ],
)  # fmt: skip
def test_each_spelling_has_one_name(given: object, name: str) -> None:
    assert dtype_name(given) == name
    assert RunConfig(dtype=given).dtype == name  # type: ignore[arg-type]  # torch's are taken too


def test_names_are_torchs() -> None:
    assert {name: str(dtype) for name, dtype in DTYPES.items()} == {
        name: f"torch.{name}" for name in SPELLINGS if name != "auto"
    }


@pytest.mark.parametrize("given", ["float23", torch.int8, None])
def test_another_format_is_refused(given: object) -> None:
    assert refusal(dtype_name, given).endswith("known: auto, float32, bfloat16, float16")
