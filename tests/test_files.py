"""Files as users write them: no value of a YAML becomes another."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitwiser import constants
from splitwiser.files import find_config, load_yaml, named_configs, read_yaml, write_yaml
from tests.support.assertions import assert_says, refusal

VALUES = [
    ("10:40", "10:40"), ("1:30.5", "1:30.5"), ("2023-11-16", "2023-11-16"), ("010", "010"), ("0x10", "0x10"),
    ("64", 64), ("-3", -3), ("0", 0), ("0.5", 0.5), ("1e3", 1000.0), (".inf", float("inf")), ("true", True), ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_a_plain_value_is_what_it_reads_as(text: str, value: Any) -> None:
    found = load_yaml(text)
    assert (found, type(found)) == (value, type(value))


def test_values_read_alike_where_pyyaml_lacks_libyaml() -> None:
    without = "import yaml; vars(yaml).pop('CSafeLoader', None)"
    program = f"{without}; from splitwiser.files import load_yaml; print(list(map(load_yaml, {{}})))"
    texts, values = zip(*VALUES, strict=True)
    command = [sys.executable, "-c", program.format(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{list(values)}\n"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: a\n")
    assert read_yaml(path) == {"name": "a"}


@pytest.mark.parametrize("text", ["a: [", "\0", "[" * 3000])
def test_what_is_no_yaml_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    assert_says(refusal(read_yaml, path), f"{path}: not valid YAML: ")


def test_a_path_is_written_as_its_text(tmp_path: Path) -> None:
    write_yaml(tmp_path / "a.yaml", {"model": tmp_path, "mode": "mp"})
    assert read_yaml(tmp_path / "a.yaml") == {"model": str(tmp_path), "mode": "mp"}


def test_a_name_of_configs_goes_before_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("example").touch()
    Path("own.yaml").touch()
    shipped = constants.DIR_CONFIGS / "sweeps" / "example.yaml"
    assert named_configs("sweeps")["example"] == find_config("sweeps", "example", "sweep") == shipped
    assert find_config("sweeps", "./example", "sweep") == Path("example")
    assert find_config("sweeps", "own.yaml", "sweep") == Path("own.yaml")


def test_what_is_neither_name_nor_path_gets_the_names_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DIR_CONFIGS", tmp_path)
    (tmp_path / "sweeps").mkdir()
    for name in ("b", "a"):
        (tmp_path / "sweeps" / f"{name}.yaml").touch()
    message = refusal(find_config, "sweeps", "c", "sweep")
    assert message == "sweep c: no such file, and unknown name of configs/sweeps 'c'; known: a, b"
