"""Tables in place of the parts that depend on positions give what those parts give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitwiser.errors import UnsupportedModelError
from splitwiser.model.attention import serving
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.model.seq2seq.parts import bias_table, replace_parts
from splitwiser.model.seq2seq.steps import EncoderStep
from tests.support.models import POSITIONS


def load(directory: Path) -> LoadedModel:
    return load_model(directory, dtype="float32", device="cpu", load_format="auto")


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_a_bias_table_gives_the_bias_of_every_pair(name: str, half: str, tiny: Callable[[str], Path]) -> None:
    block: Any = getattr(load(tiny(name)).module, half).block[0]
    attention = block.layer[0].SelfAttention
    length = 100  # three times the distance up to which the bias changes
    expected = attention.compute_bias(length, length)[0]
    table = bias_table(attention)
    queries, keys = torch.arange(length)[:, None], torch.arange(length)[None]
    if half == "decoder":
        seen = keys <= queries
        assert torch.equal(table[:, (queries - keys).clamp(0, 32)][:, seen], expected[:, seen])
    else:
        assert torch.equal(table[:, (keys - queries).clamp(-32, 32) + 32], expected)


def test_a_bias_that_goes_on_is_refused(tiny: Callable[[str], Path]) -> None:
    module: Any = load(tiny("t5")).module
    attention = module.encoder.block[0].layer[0].SelfAttention
    attention.compute_bias = lambda queries, keys: torch.arange(float(keys)).expand(1, 4, queries, keys)
    with pytest.raises(UnsupportedModelError, match="T5Attention: its bias goes on beyond 32 tokens"):
        replace_parts(module, None)


@pytest.mark.parametrize("name", ["bart", "pegasus", "m2m_100"])
def test_positions_of_packed_sources_count_from_their_own_starts(name: str, tiny: Callable[[str], Path]) -> None:
    module: Any = load(tiny(name)).module
    encoder = module.get_encoder()
    found: list[torch.Tensor] = []

    def keep(_: object, __: object, embeddings: torch.Tensor) -> None:
        found.append(embeddings.reshape(-1, 48))

    encoder.embed_positions.register_forward_hook(keep)
    encoder(input_ids=torch.full((1, 9), 5))
    replace_parts(module, POSITIONS)
    with serving(EncoderStep([4, 9], torch.device("cpu"))):
        packed = encoder.embed_positions()[0]
    assert torch.equal(packed, torch.cat([found[0][:4], found[0]]))
