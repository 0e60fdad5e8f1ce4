"""What the listing of models says, counted without weights."""

from pathlib import Path

import pytest

from splitwiser import constants
from splitwiser.model.checkpoints.catalog import load_catalog
from splitwiser.model.overview import Overview, describe_model

CATALOG = load_catalog(constants.MODELS)


def listed(tmp_path: Path, text: str) -> Overview:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    return describe_model(load_catalog(path)["mine"], path)


@pytest.mark.parametrize(
    ("name", "parameters", "route"),
    [
        ("opt-125m", 125_239_296, "packed"),
        ("smollm2-135m", 134_515_008, "packed"),
        ("falcon-7b-instruct", 6_921_720_704, "packed, with this project's FalconAttention"),
    ],
)
def test_parameters_and_bytes_are_those_of_the_model(name: str, parameters: int, route: str) -> None:
    assert describe_model(CATALOG[name], constants.MODELS) == Overview(parameters, 2 * parameters, route, "yes")


def test_an_encoder_decoder_is_served_with_lora() -> None:
    found = describe_model(CATALOG["t5-small"], constants.MODELS)
    assert (found.route, found.adapters) == ("packed, encoder-decoder", "LoRA")


def test_a_model_that_is_refused_is_counted_and_said_why(tmp_path: Path) -> None:
    found = listed(tmp_path, "mine: {hub: org/mine, config: {model_type: mamba, num_hidden_layers: 2}}")
    assert found.parameters
    assert (found.route, "MambaForCausalLM keeps a recurrent state" in found.problem) == ("", True)


def test_figures_that_make_no_model_are_said(tmp_path: Path) -> None:
    found = listed(tmp_path, "mine: {hub: org/mine, config: {model_type: no_such_architecture}}")
    said = "model mine: unknown model_type 'no_such_architecture'"
    assert (found.parameters, found.problem[: len(said)]) == (None, said)


def test_a_model_of_the_hub_is_not_asked_for(tmp_path: Path) -> None:
    assert listed(tmp_path, "mine: {hub: org/mine}") == Overview(problem="its configuration is not on this machine")
