"""The README's first command in a clean clone with an empty home.

What the set-up asks of pip is recorded, not downloaded: the packages are those of this environment, to which the test
command has just installed the pins with the same script (``scripts/test.sh`` sources ``scripts/setup.sh``), so that on a
fresh machine set-up proper is tried by every run of the suite.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from splitwiser.machine.user_cache import cache_directory

PROJECT = Path(__file__).resolve().parents[2]

# stands for python3 and for the interpreter of the environment that it makes: records pip's part and leaves the rest to
# this environment's interpreter
PYTHON = f"""#!/bin/sh
case "$1 $2" in
"-m venv")
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
    echo "venv" >>"$SETUP_ASKED" ;;
"-m pip")
    echo "$*" >>"$SETUP_ASKED"
    ! [ -e "$SETUP_ASKED.fails" ] ;;
*)
    exec {sys.executable} "$@" ;;
esac
"""


@dataclass(frozen=True)
class Clone:
    folder: Path
    asked: Path
    environment: dict[str, str]

    def popen(self, *command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def start(self, *command: str) -> subprocess.CompletedProcess[str]:
        process = self.popen(*command)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def set_up(self) -> subprocess.CompletedProcess[str]:
        return self.start(*SET_UP)

    @property
    def steps(self) -> list[str]:
        """What was asked of ``python -m venv`` and pip."""
        return self.asked.read_text().splitlines() if self.asked.exists() else []


SET_UP = ("bash", "-c", "source scripts/setup.sh && echo $PYTHON")


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    folder, home, programs = tmp_path / "clone", tmp_path / "home", tmp_path / "programs"
    home.mkdir()
    programs.mkdir()
    (programs / "python3").write_text(PYTHON)
    (programs / "python3").chmod(0o755)
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", PROJECT, folder], check=True)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "CONDA", "PYTHONPATH"))
    }
    asked = tmp_path / "asked"
    changed = {
        "HOME": str(home), "SETUP_ASKED": str(asked), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(cache_directory().parent),  # for the compiled functions; test_build.py compiles them
    }  # fmt: skip
    return Clone(folder, asked, {**kept, **changed})


def expected_steps(clone: Clone) -> list[str]:
    pip = "-m pip --disable-pip-version-check install --quiet"
    pins = clone.folder / "env" / "requirements.txt"
    (torch,) = [line for line in pins.read_text().splitlines() if line.startswith("torch==")]
    return ["venv", f"{pip} {torch}", f"{pip} -r {pins}", f"{pip} --no-deps -e {clone.folder}"]


@pytest.mark.slow
def test_run_discrete_in_a_clean_clone(clone: Clone) -> None:
    first = clone.start("./run_discrete.sh", "--limit", "8")
    assert first.returncode == 0, first.stderr
    assert "setting up" in first.stderr
    assert clone.steps == expected_steps(clone)
    for step in ("1/4 an environment of Python 3", "2/4 PyTorch", "3/4 transformers", "4/4 splitwiser"):
        assert step in first.stderr
    assert "results     " in first.stdout
    (directory,) = (clone.folder / "results").glob("radiology-opt_case0_sequential_*")
    assert pd.read_csv(directory / "throughput.csv").completed.tolist() == [8]
    assert pd.read_csv(directory / "generations.csv").summary_gen.str.len().min() > 10

    status = clone.start("git", "status", "--porcelain")
    assert status.stdout == ""  # what set-up and a run make is ignored by git

    if not Path("/dev/nvidiactl").exists():
        one_line = clone.start("./run_discrete_mps.sh")
        assert one_line.returncode == 2
        (line,) = one_line.stderr.splitlines()
        assert line.startswith("splitwiser: mode mps: there is no NVIDIA GPU here")
        assert line.endswith("; use mode mp")


def test_an_environment_is_set_up_once_for_its_pins(clone: Clone) -> None:
    python = f"{clone.folder}/.venv/bin/python\n"
    first = clone.set_up()
    assert (first.returncode, first.stdout) == (0, python), first.stderr
    steps = clone.steps
    assert steps == expected_steps(clone)

    second = clone.set_up()
    assert (second.stdout, second.stderr) == (python, "")
    assert clone.steps == steps

    pins = clone.folder / "env" / "requirements.txt"
    pins.write_text(f"{pins.read_text()}# another set\n")
    assert clone.set_up().stdout == python
    assert clone.steps == 2 * steps


def test_a_set_up_that_failed_says_so_and_is_tried_again(clone: Clone) -> None:
    fails = clone.asked.with_name("asked.fails")
    fails.touch()
    failed = clone.set_up()
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.splitlines()[-1].startswith(f"splitwiser: setting up {clone.folder}/.venv failed")
    assert clone.steps == expected_steps(clone)[:2]
    fails.unlink()
    assert clone.set_up().returncode == 0
    assert clone.steps[2:] == expected_steps(clone)


def test_two_first_starts_side_by_side_set_up_once(clone: Clone) -> None:
    both = [clone.popen(*SET_UP) for _ in range(2)]
    for process in both:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, f"{clone.folder}/.venv/bin/python\n"), errors
    assert clone.steps == expected_steps(clone)


def test_an_active_environment_that_has_the_packages_is_used(clone: Clone) -> None:
    environment = clone.environment | {"VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(SET_UP, cwd=clone.folder, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{sys.prefix}/bin/python\n", f"using the active environment {sys.prefix}\n")
    assert clone.steps == []


def test_without_a_python_that_is_new_enough_one_line_says_so(clone: Clone, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "flock", "readlink", "sha256sum"):
        (tools / name).symlink_to(
            next(each for each in map(Path, (f"/usr/bin/{name}", f"/bin/{name}")) if each.exists())
        )
    environment = clone.environment | {"PATH": str(tools)}
    done = subprocess.run(SET_UP, cwd=clone.folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "splitwiser: Python 3.11 or newer is needed, and none is on PATH\n")


def test_the_pinned_versions_go_together() -> None:
    lines = (PROJECT / "env" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    installed = {canonicalize_name(each.metadata["Name"]): each.version for each in metadata.distributions()}
    other = [str(pin) for pin in pins if not pin.specifier.contains(installed.get(canonicalize_name(pin.name), "0"))]
    if other:
        pytest.skip(f"this environment is not of the pinned versions: {', '.join(other)}")
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
