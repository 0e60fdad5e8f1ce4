"""Random weights in place of a checkpoint's."""

import pytest

from splitwiser.model.loading import load_model


@pytest.mark.parametrize(("name", "has_one"), [("flan-t5-small", True), ("t5-small", False)])
def test_an_output_layer_of_its_own_is_drawn_where_checkpoints_have_one(name: str, has_one: bool) -> None:
    module = load_model(name, dtype="bfloat16", device="cpu", load_format="dummy").module
    head, embeddings = module.get_output_embeddings().weight, module.get_input_embeddings().weight
    assert (head is not embeddings) == has_one
    assert bool(head.any())
