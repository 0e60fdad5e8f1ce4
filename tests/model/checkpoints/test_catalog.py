"""The catalogue's models, what each name stands for, and the line that each wrong name or file gets."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from splitwiser import constants
from splitwiser.model.checkpoints.catalog import EMBEDDED_MODEL, CatalogEntry, load_catalog, resolve_model
from splitwiser.model.checkpoints.weights import auto_class, tie_weights
from tests.support.assertions import assert_says, refusal

MODELS = constants.MODELS

PARAMETERS = {  # fewest and most, from what each model's name or card says
    "opt-125m": (125e6 * 0.97, 125e6 * 1.03),
    "llama2-7b-chat": (6.5e9, 7.3e9),
    "llama2-13b-chat": (12.6e9, 13.4e9),
    "llama2-70b-chat": (68.5e9, 69.5e9),
    "falcon-7b-instruct": (6.9e9, 7.3e9),
    "falcon-rw-1b": (1.31e9, 1.32e9),
    "bloom-560m": (559.2e6, 559.3e6),
    "mpt-7b": (6.64e9, 6.66e9),
    "gpt-j-6b": (6.05e9, 6.06e9),
    "qwen3-0.6b": (595.5e6, 596.5e6),
    "smollm2-135m": (134.4e6, 134.6e6),
    "smollm2-135m-instruct": (134.4e6, 134.6e6),
    "llama-3.2-1b": (1.235e9, 1.237e9),
    "t5-small": (60.4e6, 60.6e6),
    "t5-base": (222e6, 223e6),
    "t5-large": (737e6, 739e6),
    "flan-t5-small": (76.9e6, 77e6),
    "flan-t5-base": (247.5e6, 247.7e6),
    "flan-t5-large": (783e6, 784e6),
    "flan-t5-xl": (2.84e9, 2.86e9),
    "flan-t5-xxl": (11.1e9, 11.2e9),
    "flan-ul2": (19.5e9, 19.7e9),
}
BUILDABLE = [entry.name for entry in load_catalog(MODELS).values() if entry.config]


def write(directory: Path, text: str) -> Path:
    path = directory / "models.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def parameters(name: str) -> int:
    with torch.device("meta"):  # shapes without memory
        config = AutoConfig.for_model(**load_catalog(MODELS)[name].config)
        model = auto_class(config).from_config(config)
        tie_weights(model)
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_entry_with_figures_has_an_expected_size() -> None:
    assert sorted(BUILDABLE) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", BUILDABLE)
def test_figures_give_as_many_parameters_as_the_name_says(name: str) -> None:
    least, most = PARAMETERS[name]
    assert least <= parameters(name) <= most


@pytest.mark.parametrize("name", ["qwen3-0.6b", "smollm2-135m", "llama-3.2-1b", "opt-125m"])
def test_small_models_tie_their_embeddings(name: str) -> None:
    assert AutoConfig.for_model(**load_catalog(MODELS)[name].config).tie_word_embeddings


def test_every_hub_decoder_can_be_built_without_a_download() -> None:
    decoders = [entry for entry in load_catalog(MODELS).values() if entry.kind == "decoder" and entry.hub]
    assert decoders
    assert [entry.name for entry in decoders if not entry.config] == []


def test_every_entry_has_a_place_to_load_from() -> None:
    assert [entry.name for entry in load_catalog(MODELS).values() if not entry.location] == []


def test_every_entry_is_of_a_known_kind() -> None:
    assert {entry.kind for entry in load_catalog(MODELS).values()} == {"decoder", "encoder-decoder"}


@pytest.mark.parametrize("name", [constants.MODEL, EMBEDDED_MODEL])
def test_default_models_are_in_the_catalogue(name: str) -> None:
    assert resolve_model(name).name == name


def test_a_path_is_relative_to_the_folder_of_the_file(tmp_path: Path) -> None:
    assert resolve_model(EMBEDDED_MODEL).location == str(constants.DIR_PROJECT / "models" / EMBEDDED_MODEL)
    assert resolve_model("mine", write(tmp_path, "mine: {path: here}")).location == str(tmp_path / "here")


def test_a_path_goes_before_the_hub_where_something_is_there(tmp_path: Path) -> None:
    models = write(tmp_path, "mine: {path: here, hub: org/mine}")
    assert resolve_model("mine", models).location == "org/mine"
    (tmp_path / "here").mkdir()
    assert resolve_model("mine", models).location == str(tmp_path / "here")


def test_catalogue_name_gives_its_entry(tmp_path: Path) -> None:
    path = write(tmp_path, "mine: {hub: org/mine-7b, config: {model_type: opt, vocab_size: 5}}")
    expected = CatalogEntry("mine", hub="org/mine-7b", config={"model_type": "opt", "vocab_size": 5})
    assert resolve_model("mine", path) == expected
    assert expected.location == "org/mine-7b"


def test_checkpoint_directory_goes_by_its_name(tmp_path: Path) -> None:
    directory = tmp_path / "my-model"
    directory.mkdir()
    (directory / "config.json").write_text("{}", encoding="utf-8")
    entry = resolve_model(directory)
    assert (entry.name, entry.location, entry.kind) == ("my-model", str(directory), "decoder")


def test_relative_directory_goes_by_its_real_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert (resolve_model(".").name, resolve_model(".").location) == (tmp_path.name, str(tmp_path))


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}", encoding="utf-8")
    assert resolve_model("~/mine").location == str(tmp_path / "mine")


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    message = refusal(resolve_model, tmp_path)
    assert_says(message, f"model directory {tmp_path}: no config.json in it", "save_pretrained")


def test_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("m/config.json", tmp_path / "m" / "config.json"):  # the first has the form of a hub id
        assert_says(refusal(resolve_model, name), f"model {name}: is a file; give the directory")


def test_no_name_is_not_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert_says(refusal(resolve_model, ""), "unknown model ''; ")


def test_hub_id_goes_by_its_last_part() -> None:
    entry = resolve_model("someone/some-model")
    assert (entry.name, entry.location, entry.path, entry.config) == ("some-model", "someone/some-model", "", {})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("opt-125", "opt-125m"),
        ("llama2-7b", "llama2-7b-chat"),
        ("qwen3", "qwen3-0.6b"),
        ("falcon-7b", "falcon-7b-instruct"),
    ],
)
def test_unknown_name_gets_the_nearest(name: str, nearest: str) -> None:
    message = refusal(resolve_model, name)
    assert message.startswith(f"unknown model '{name}'; did you mean ")
    assert nearest in message


def test_unknown_name_with_nothing_near_lists_all() -> None:
    assert_says(refusal(resolve_model, "zzz"), "unknown model 'zzz'; known: radiology-opt, opt-125m, ", "llama-3.2-1b")


@pytest.mark.parametrize("name", ["/nowhere", "/no/where", "./nowhere", "~/nowhere", "../nowhere", "a/b/c", "org/"])
def test_missing_path_is_no_hub_id(name: str) -> None:
    assert_says(refusal(resolve_model, name), f"unknown model '{name}'; ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    message = refusal(load_catalog, path)
    assert message == f"{path}: no such file"


@pytest.mark.parametrize("text", ["opt: {hub: [", "a: b: c"])
def test_broken_yaml_is_named(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert_says(refusal(load_catalog, path), f"{path}: not valid YAML: ", "line")


def test_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_bytes("größe: {hub: a/b}".encode("latin-1"))
    assert_says(refusal(load_catalog, path), str(path))


@pytest.mark.parametrize("text", ["", "- opt", "opt", "opt-125m: facebook/opt-125m", "opt-125m:"])
def test_file_that_maps_no_entries_shows_what_it_should(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert_says(refusal(load_catalog, path), f"{path}: must map names to entries", "hub: facebook/opt-125m")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mine: {kind: decoder}", ["needs a 'path' or a 'hub' id"]),
        ("mine: {hub: ''}", ["needs a 'path' or a 'hub' id"]),
        ("mine: {hubb: a/b}", ["unknown key 'hubb'", "known: path, hub, kind, config"]),
        ("mine: {hub: a/b, name: other}", ["unknown key 'name'"]),
        ("mine: {hub: a/b, kind: encoder}", ["kind", "'encoder'", "decoder, encoder-decoder"]),
        ("mine: {hub: 5}", ["'hub'", "5"]),
        ("mine: {path: [a]}", ["'path'", "['a']"]),
        ("mine: {hub: a/b, config: opt}", ["'config'", "'opt'"]),
        ("mine: {hub: a/b, config: {vocab_size: 5}}", ["'config'", "model_type"]),
    ],
)
def test_wrong_entry_is_named_with_its_key(text: str, parts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert_says(refusal(load_catalog, path), f"{path}, model mine: ", *parts)
