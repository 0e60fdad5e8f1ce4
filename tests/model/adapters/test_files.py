"""Adapters as users name them, and the line that each wrong one gets."""

import json
from pathlib import Path
from typing import Any

import pytest

from splitwiser.model.adapters import files
from splitwiser.model.adapters.files import AdaptersGiven, find_adapters
from splitwiser.model.checkpoints.catalog import CatalogEntry
from tests.support.assertions import assert_says, refusal

MODEL = CatalogEntry("mine")


def write(directory: Path, weights: bool = True, **config: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    if weights:
        (directory / "adapter_model.safetensors").touch()
    return directory


def test_text_and_mappings_name_directories(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", peft_type="P_TUNING", num_virtual_tokens=7)
    forms: tuple[AdaptersGiven, ...] = (f"a={one}, b={two}", {"a": one, "b": str(two)})
    for given in forms:
        found = find_adapters(given, MODEL)
        assert [(each.name, each.directory, each.virtual_tokens) for each in found.values()] == [
            ("a", one, 0),
            ("b", two, 7),
        ]


def test_a_name_alone_is_an_adapter_that_comes_with_the_model(tmp_path: Path) -> None:
    directory = write(tmp_path / "adapters" / "style")
    own = CatalogEntry("mine", path=str(tmp_path))
    assert find_adapters("style", own)["style"].directory == directory
    message = refusal(find_adapters, "other", own)
    assert message == "--adapter other: model mine brings style; write --adapter other=DIRECTORY for another"
    assert "comes without adapters" in refusal(find_adapters, "style", MODEL)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"peft_type": "IA3"}, "unknown kind of adapter 'IA3'; known: LORA, PREFIX_TUNING, PROMPT_TUNING, P_TUNING"),
        ({"task_type": "SEQ_CLS"}, "is made for the task SEQ_CLS; one for CAUSAL_LM or SEQ_2_SEQ_LM is needed"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 0}, "must be a whole number of 1 or more, not 0"),
    ],
)
def test_what_is_not_served_is_named(config: dict[str, Any], part: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "a", **config)
    assert_says(refusal(find_adapters, {"x": directory}, MODEL), f"--adapter x: {directory}: ", part)


def test_broken_directories_are_named(tmp_path: Path) -> None:
    assert_says(refusal(find_adapters, {"x": tmp_path / "none"}, MODEL), "none: no such directory")
    assert_says(refusal(find_adapters, {"x": tmp_path}, MODEL), "no adapter_config.json in it")
    without = write(tmp_path / "a", weights=False)
    assert_says(refusal(find_adapters, {"x": without}, MODEL), "no adapter_model.safetensors in it")
    (without / "adapter_model.safetensors").touch()
    (without / "adapter_config.json").write_text("[]")
    assert_says(refusal(find_adapters, {"x": without}, MODEL), "adapter_config.json cannot be read: TypeError")


@pytest.mark.parametrize("given", ["a={0},a={0}", "none={0}", "={0}"])
def test_each_adapter_needs_a_name_of_its_own(given: str, tmp_path: Path) -> None:
    assert "name" in refusal(find_adapters, given.format(write(tmp_path / "a")), MODEL)


def test_without_peft_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    message = refusal(find_adapters, {"a": write(tmp_path / "a")}, MODEL)
    assert message == "--adapter: reading adapters needs the 'peft' package; pip install peft"


def test_weights_are_described_anew_when_they_change(tmp_path: Path) -> None:
    directory = write(tmp_path / "a")
    (found,) = find_adapters({"a": directory}, MODEL).values()
    before = found.describe_weights()
    (directory / "adapter_model.safetensors").write_text("more")
    assert found.describe_weights() != before
