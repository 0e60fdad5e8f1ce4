"""What a model is expected to need before it is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from splitwiser.doctor.needs import _likely_layers
from splitwiser.model.compatibility import attach_engine
from splitwiser.model.loading import load_model


@pytest.mark.parametrize("name", ["llama", "falcon", "falcon_new", "falcon_rw", "mpt"])
def test_layers_are_expected_to_store_what_they_do(name: str, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny(name), dtype="float32", device="cpu", load_format="auto")
    assert _likely_layers(model.module.config) == attach_engine(model)
