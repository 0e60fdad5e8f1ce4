"""The README's first command on a fresh machine: a clean clone, an empty home, nothing installed."""

import os
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_discrete_in_a_clean_clone(tmp_path: Path) -> None:
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", PROJECT, clone], check=True)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "CONDA", "PYTHONPATH"))
    }
    environment = {**kept, "HOME": str(home)}

    def start(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=clone, env=environment, capture_output=True, text=True, timeout=850, check=False
        )

    first = start("./run_discrete.sh", "--limit", "8")
    assert first.returncode == 0, first.stderr
    assert "setting up" in first.stderr
    for step in ("1/4 an environment of Python 3", "2/4 PyTorch", "3/4 transformers", "4/4 splitwiser"):
        assert step in first.stderr
    assert "results     " in first.stdout
    (directory,) = (clone / "results").glob("radiology-opt_case0_sequential_*")
    assert pd.read_csv(directory / "throughput.csv").completed.tolist() == [8]
    assert pd.read_csv(directory / "generations.csv").summary_gen.str.len().min() > 10

    began = time.monotonic()
    second = start("bash", "-c", "source scripts/setup.sh && echo $PYTHON")
    assert time.monotonic() - began < 2
    assert (second.stdout, second.stderr) == (f"{clone}/.venv/bin/python\n", "")

    # the second command, with one file of tests: the whole suite is what calls this test
    tests = start("scripts/test.sh", "tests/test_errors.py")
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "All checks passed!" in tests.stdout
    assert "Success: no issues found" in tests.stdout

    status = start("git", "status", "--porcelain")
    assert status.stdout == ""  # what set-up and a run make is ignored by git

    if not Path("/dev/nvidiactl").exists():
        one_line = start("./run_discrete_mps.sh")
        assert one_line.returncode == 2
        (line,) = one_line.stderr.splitlines()
        assert line.startswith("splitwiser: mode mps: there is no NVIDIA GPU here")
        assert line.endswith("; use mode mp")
