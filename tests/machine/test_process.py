"""Processes where a user's surroundings differ from ours."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from splitwiser.machine.process import uninterrupted

SCRIPT = """
from splitwiser import LLM, SamplingParams
with LLM(mode="mp", kv_memory="8MiB") as llm:
    print(len(llm.generate(["clear"], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids))
"""


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    src = str(Path(__file__).parents[2] / "src")
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": src, **environment},
        timeout=280,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("surroundings", ["a file named as a module", "a long TMPDIR"])
def test_workers_start_wherever_the_user_is(surroundings: str, tmp_path: Path) -> None:
    """Nor need the script an ``if __name__ == "__main__"``."""
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


@pytest.mark.slow
def test_the_command_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    for name in ("random", "json", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the wrong one')\n")
    done = run(["-m", "splitwiser", "models"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def interrupt(times: int, after: int, told: list[str]) -> None:
    """Press Ctrl-C so often in a block that holds it ``after`` the first so many."""
    with uninterrupted(after):
        try:
            signal.raise_signal(signal.SIGINT)
            told.append("went on")
        finally:
            for _ in range(times - 1):
                signal.raise_signal(signal.SIGINT)
            told.append("cleaned up")


@pytest.mark.parametrize(
    ("times", "after", "wanted"),
    [
        (1, 0, ["went on", "cleaned up"]),
        (3, 0, ["went on", "cleaned up"]),
        (1, 1, ["cleaned up"]),
        (3, 1, ["cleaned up"]),
    ],
)
def test_further_interruptions_wait_until_the_block_has_ended(times: int, after: int, wanted: list[str]) -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(times, after, told)
    assert told == wanted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
