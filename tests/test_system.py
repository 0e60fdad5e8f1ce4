"""Processes where a user's surroundings differ from ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from splitwiser import LLM, SamplingParams
with LLM(mode="mp", kv_memory="8MiB") as llm:
    print(len(llm.generate(["clear"], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids))
"""


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    src = str(Path(__file__).parents[1] / "src")
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": src, **environment},
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize("surroundings", ["a file named as a module", "a long TMPDIR"])
def test_workers_start_wherever_the_user_is(surroundings: str, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    (tmp_path / "script").mkdir()
    script = tmp_path / "script" / "uses.py"
    script.write_text(SCRIPT)
    if surroundings == "a long TMPDIR":
        done = run([str(script)], tmp_path, TMPDIR=str(deep))
    else:
        (tmp_path / "random.py").write_text("raise ImportError('the wrong one')\n")
        done = run([str(script)], tmp_path)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_the_command_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    for name in ("random", "json", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the wrong one')\n")
    done = run(["-m", "splitwiser", "models"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
