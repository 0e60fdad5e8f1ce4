"""The table of attention modules of this project, and how a model gets them."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from splitwiser import LLM
from splitwiser.model.compatibility import attach_engine
from splitwiser.model.dispatch.table import REPLACEMENTS, describe_route
from splitwiser.model.kernels.packed_linear import PackedLinear, find_packing_problem
from splitwiser.model.loading import load_model


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_every_row_names_a_class_of_transformers(kind: str) -> None:
    module, _, name = kind.partition(".")
    assert hasattr(import_module(f"transformers.models.{module.removeprefix('modeling_')}.{module}"), name)


@pytest.mark.parametrize(("name", "kv_heads"), [("falcon", 1), ("falcon_new", 2), ("falcon_rw", 4)])
def test_each_key_of_falcon_is_stored_once(name: str, kv_heads: int, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny(name), dtype="float32", device="cpu", load_format="auto")
    assert [layer.kv_heads for layer in attach_engine(model)] == [kv_heads] * 2


@pytest.mark.skipif(find_packing_problem() is not None, reason=str(find_packing_problem()))
def test_linear_layers_of_falcon_are_packed(tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny("falcon_rw"), dtype="bfloat16", device="cpu", load_format="auto")
    attach_engine(model, pack=True)
    assert sum(isinstance(part, PackedLinear) for part in model.module.modules()) == 4 * 2 + 1
    assert not [part for part in model.module.modules() if isinstance(part, torch.nn.Linear)]


@pytest.mark.parametrize(("name", "route"), [("opt", "packed"), ("mpt", "packed, with this project's MptAttention")])
def test_the_route_is_recorded(name: str, route: str, tiny: Callable[[str], Path]) -> None:
    with LLM(tiny(name)) as llm:
        assert llm.started.kernels["route"] == route == describe_route(llm.model.module)
