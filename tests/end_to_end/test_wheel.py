"""The wheel holds all that a user needs, and works from a folder that is not a checkout."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import yaml

from splitwiser import __version__, constants

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling is not installed, which builds the wheel"),
]
Command = Callable[..., subprocess.CompletedProcess[str]]


def pip(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder, constants.DIR_PROJECT)
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


@pytest.fixture
def splitwiser(installed: Path, tmp_path: Path) -> Command:
    """Runs the installed command in the empty folder ``work``, with an empty home."""
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(home), "SPLITWISER_COMMIT": ""}
    environment.pop("XDG_CACHE_HOME", None)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", f"{installed}/bin/splitwiser", *arguments]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        return done

    return run


def test_it_holds_the_package_and_what_is_shipped_with_it_alone(wheel: Path) -> None:
    assert wheel.name == f"splitwiser-{__version__}-py3-none-any.whl"
    source, project = constants.DIR_PROJECT / "src", constants.DIR_PROJECT
    own = [path.relative_to(source) for path in (source / "splitwiser").rglob("*") if path.suffix != ".pyc"]
    shipped = [
        "splitwiser/shipped" / path.relative_to(project)
        for folder in ("configs", "models/data", "models/radiology-opt")
        for path in (project / folder).rglob("*")
    ]
    expected = {str(path) for path in (*own, *shipped) if path.suffix}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {path.rpartition(".")[2] for path in held} >= {
        "py",
        "typed",
        "html",
        "cpp",
        "h",
        "yaml",
        "tok",
        "safetensors",
    }


def test_it_runs_outside_of_a_checkout(splitwiser: Command, tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = splitwiser("run", "--limit", "6", "--mode", "mp", "--kernels", "plain")
    (directory,) = (work / "results").glob("radiology-opt_case0_mp_*")
    assert f"results     results/{directory.name}" in done.stdout
    row = pd.read_csv(directory / "throughput.csv").iloc[0]
    assert row.completed == 6
    assert row.rougeL > 0.9
    record = yaml.safe_load((directory / "run.yaml").read_text())
    assert (record["versions"]["splitwiser"], record["commit"]) == (__version__, None)

    assert "null prompt" in splitwiser("cases").stdout
    assert "opt-125m" in splitwiser("models").stdout
    listed = splitwiser("sweep", "example", "--list").stdout.splitlines()
    assert len(listed) == 9
    assert not (work / "results" / "sweep_example").exists()

    (work / "cases.yaml").write_text("7: {description: mine}")
    (work / "models.yaml").write_text("mine: {hub: org/mine}")
    assert splitwiser("cases", "--cases", "cases.yaml").stdout.splitlines()[1].split() == ["7", "mine"]
    listed = splitwiser("models", "--models", "models.yaml").stdout.splitlines()[1].split()
    assert (listed[0], listed[-1]) == ("mine", "org/mine")
    assert {path.name for path in work.iterdir()} == {"results", "cases.yaml", "models.yaml"}
