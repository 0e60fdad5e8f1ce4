"""One set of versions: the pins of both environments, the ranges of the package and the scripts that use them."""

import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from splitwiser import constants

PROJECT = constants.DIR_PROJECT
SCRIPTS = [
    "run_discrete.sh", "run_discrete_mp.sh", "run_discrete_mps.sh", "scripts/gpu_check.sh", "scripts/install_backend.sh",
    "scripts/install_peer.sh", "scripts/test.sh", "scripts/test_instruction_sets.sh", "scripts/test_stand_in.sh",
]  # fmt: skip


def pins_of(lines: list[str]) -> dict[str, str]:
    """Versions by name; each line must pin exactly one."""
    pins: dict[str, str] = {}
    for requirement in map(Requirement, lines):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert requirement.name not in pins, requirement
        pins[requirement.name] = specifier.version
    return pins


def pip_pins(file: str = "requirements.txt") -> dict[str, str]:
    lines = (PROJECT / "env" / file).read_text(encoding="utf-8").splitlines()
    return pins_of([line for line in lines if line.strip() and not line.startswith("#")])


def conda_dependencies() -> list[Any]:
    content = yaml.safe_load((PROJECT / "env" / "environment.yml").read_text(encoding="utf-8"))
    dependencies: list[Any] = content["dependencies"]
    return dependencies


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


RANGES = [
    *project()["dependencies"],
    *(
        line
        for extra in project()["optional-dependencies"].values()
        for line in extra
        if not line.startswith("splitwiser[")
    ),
]


def test_both_environments_pin_the_same() -> None:
    (pip,) = [each["pip"] for each in conda_dependencies() if isinstance(each, dict)]
    assert pins_of(pip) == pip_pins()


@pytest.mark.parametrize("line", RANGES)
def test_dependency_is_pinned_within_its_range(line: str) -> None:
    requirement = Requirement(line)
    assert requirement.name in pip_pins()
    assert requirement.specifier.contains(pip_pins()[requirement.name])


@pytest.mark.parametrize("line", project()["dependencies"])
def test_dependency_is_pinned_for_cuda_within_its_range(line: str) -> None:
    requirement = Requirement(line)
    assert requirement.specifier.contains(pip_pins("requirements-cuda.txt")[requirement.name])


def test_nothing_is_pinned_that_the_project_does_not_ask_for() -> None:
    assert set(pip_pins()) == {Requirement(line).name for line in RANGES}


def test_extras_are_these() -> None:
    extras = {"adapters", "datasets", "gguf", "gpu", "docs", "examples", "dev"}
    assert set(project()["optional-dependencies"]) == extras


def test_conda_python_is_one_the_package_takes() -> None:
    (line,) = [each for each in conda_dependencies() if isinstance(each, str) and each.startswith("python=")]
    assert SpecifierSet(project()["requires-python"]).contains(line.removeprefix("python="))


def test_type_checker_and_linter_aim_at_the_oldest_python() -> None:
    tools = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    oldest = project()["requires-python"].removeprefix(">=")
    assert (tools["mypy"]["python_version"], tools["ruff"]["target-version"]) == (
        oldest,
        f"py{oldest.replace('.', '')}",
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_can_be_executed(script: str) -> None:
    assert os.access(PROJECT / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_starts_with_bash(script: str) -> None:
    assert (PROJECT / script).read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/setup.sh"])
def test_bash_can_read_the_script(script: str) -> None:
    checked = subprocess.run(["bash", "-n", str(PROJECT / script)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("mode", ["sequential", "mp", "mps"])
def test_each_run_script_runs_its_mode(mode: str) -> None:
    name = "run_discrete.sh" if mode == "sequential" else f"run_discrete_{mode}.sh"
    last = (Path(PROJECT) / name).read_text(encoding="utf-8").rstrip().splitlines()[-1]
    assert last.endswith(f' run --mode {mode} "$@"')


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "install" not in script])
def test_a_script_reached_by_a_link_finds_its_project(script: str, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    python = environment / "bin" / "python"  # says what it is asked to run, and where
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PWD|$PYTHONPATH|$*"\n')
    python.chmod(0o755)
    (tmp_path / "one").symlink_to(PROJECT / script)
    link = tmp_path / "my links" / "two"
    link.parent.mkdir()
    link.symlink_to("../one")
    arguments = ["--environment", environment] if "stand_in" in script else ["--help"]
    variables = {**os.environ, "VIRTUAL_ENV": str(environment), "PYTHON": str(python)}
    done = subprocess.run([link, *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, path, asked = done.stdout.splitlines()[-1].split("|")
    assert (Path(folder) / path.split(":")[0]).resolve() == PROJECT / "src"
    assert asked.startswith(("-m splitwiser run ", "-m pytest ", f"{PROJECT}/scripts/gpu_check.py "))
