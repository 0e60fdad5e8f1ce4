"""Biases by the position of the key."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.falcon import modeling_falcon

from splitwiser.errors import UnsupportedModelError
from splitwiser.model.compatibility import attach_engine
from splitwiser.model.dispatch import falcon
from splitwiser.model.dispatch.alibi import alibi_from, alibi_table
from splitwiser.model.loading import LoadedModel, load_model


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> LoadedModel:
    return load_model(tiny("falcon_rw"), dtype="float32", device="cpu", load_format="auto")


def test_the_table_is_rounded_as_the_model_rounds(model: LoadedModel) -> None:
    table = alibi_table(model.module)
    assert table.shape == (4, 512)
    assert table[0, 257] == table[0, 256] != table[0, 258]  # bfloat16 has no 257


def test_later_positions_are_for_the_block_alone(model: LoadedModel) -> None:
    own = modeling_falcon.build_alibi_tensor
    table = alibi_table(model.module)
    with alibi_from(model.module, 100):
        later = modeling_falcon.build_alibi_tensor(torch.ones(1, 5), 4, torch.float32)
    torch.testing.assert_close(later[:, 0], table[:, 100:105] - table[:, 100:101])
    assert modeling_falcon.build_alibi_tensor is own


def test_other_biases_at_late_positions_are_refused(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_after_100(*given: object) -> Tensor:
        table = alibi_table(*given)  # type: ignore[arg-type]
        table[:, 100:] *= 0.9
        return table

    monkeypatch.setattr(falcon, "alibi_table", wrong_after_100)
    with pytest.raises(UnsupportedModelError, match="at later positions packed prompts do not give the same logits"):
        attach_engine(model)
