"""Processes where a user's surroundings differ from ours."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from splitwiser.machine.process import uninterrupted
from tests.support.processes import processes_naming, wait_for

SCRIPT = """
from splitwiser import LLM, SamplingParams
with LLM(mode="mp", kv_memory="8MiB") as llm:
    print(len(llm.generate(["clear"], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids))
"""


FOLDER = """
import signal, sys
from pathlib import Path
from splitwiser.machine.process import temporary_folder
with temporary_folder() as folder:
    (Path(folder) / "weights").touch()
    print(folder, flush=True)
    if sys.argv[1] == "waits":
        signal.pause()
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
def test_workers_start_wherever_the_user_is(tmp_path: Path) -> None:
    """Beside a file named as a module, with a TMPDIR too long for a socket's path, from a script without an
    ``if __name__ == "__main__"``."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    (tmp_path / "random.py").write_text("raise ImportError('the wrong one')\n")
    script = tmp_path / "script" / "uses.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    done = run([str(script)], tmp_path, TMPDIR=str(deep))
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


@pytest.mark.parametrize("how", ["ends", "waits"])
def test_a_temporary_folder_ends_with_its_process_even_if_that_is_killed(how: str) -> None:
    src = str(Path(__file__).parents[2] / "src")
    command = [sys.executable, "-c", FOLDER, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": src}) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        if how == "waits":
            assert [path.name for path in folder.iterdir()] == ["weights"]
            process.kill()
    wait_for(lambda: not folder.exists(), "end of the folder")
    wait_for(lambda: not processes_naming(folder), "end of what removed the folder")
