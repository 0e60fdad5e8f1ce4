"""How the command starts: mistakes are told before PyTorch is imported, and a run imports only what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from splitwiser.machine.cuda_probe import find_driver_problem

pytestmark = pytest.mark.slow

MAIN = """
import json, sys
from splitwiser.cli import main
code = main(sys.argv[1:])
heavy = ["torch", "transformers", "pandas", "scipy", "matplotlib", "datasets", "nltk"]
print(json.dumps([code, [each for each in heavy if each in sys.modules]]))
"""


def imported(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """The command's exit code, which heavy packages it imported, and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments], cwd=folder, capture_output=True, text=True, timeout=100, check=True
    )
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    return code, heavy, done.stderr


TABLES_AND_PLOTS = ["pandas", "matplotlib", "datasets", "nltk", "scipy.stats"]
MISTAKES = {
    "run --model nope": "unknown model 'nope'",
    "advise --model t5-base": "model t5-base is an encoder-decoder, and splitwiser advise takes decoders only",
    "run --model .": "no config.json",
    "run --case_id 77": "unknown case '77'",
    "run --data missing.csv": "--data missing.csv: no such file",
    "run --workload missing.json": "--workload missing.json: no such file",
    "run --dtype float13": "unknown --dtype 'float13'",
    "run --device gpu0": "device 'gpu0': must be",
    "run --kernels fast": "unknown --kernels 'fast'",
    "run --load_format gguf": "unknown --load_format 'gguf'",
    "run --mode both": "unknown mode 'both'",
    "run --mode mp --workers missing.yaml": "workers 'missing.yaml': neither a file",
    "run --mode mp --case_id 77": "unknown case '77'",
    "compare --modes sequential": "a comparison needs two variants",
    "compare --modes sequential,mp --model nope": "unknown model 'nope'",
    "compare --modes sequential,mp --case_id 77": "unknown case '77'",
    "compare --modes sequential,mp --variant a:--foo": "unknown option '--foo'",
    "compare --modes sequential,mp,generate --variant a:--model=nope": "variant a: unknown model 'nope'",
    "sweep missing.yaml": "missing.yaml: no such file",
    "report missing": "missing: no such folder",
    "profile --model nope": "unknown model 'nope'",
    "profile --batch_sizes x": "--batch_sizes 'x'",
    "advise --model nope --prompt_tokens 5": "unknown model 'nope'",
    "doctor --model nope": "unknown model 'nope'",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_before_anything_large_is_imported(command: str, tmp_path: Path) -> None:
    code, heavy, said = imported(tmp_path, *command.split())
    tables = ["pandas", "matplotlib"] if command.startswith(("compare", "sweep", "report")) else []
    assert (code, [each for each in heavy if each not in tables]) == (2, [])
    assert MISTAKES[command] in said


@pytest.mark.skipif(find_driver_problem() is None, reason="the driver of an NVIDIA GPU is here")
@pytest.mark.parametrize("mode", ["mps", "green"])
def test_a_mode_that_needs_a_gpu_is_refused_without_one_as_early(mode: str, tmp_path: Path) -> None:
    code, heavy, said = imported(tmp_path, "run", "--mode", mode)
    assert (code, heavy) == (2, [])
    assert f"mode {mode}: there is no NVIDIA GPU here" in said


def test_starting_a_model_needs_none_of_the_packages_for_tables_and_plots(tmp_path: Path) -> None:
    program = f"import sys, splitwiser.run; print([each for each in {TABLES_AND_PLOTS} if each in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_reading_weights_shows_no_bar(tmp_path: Path) -> None:
    program = "from splitwiser import LLM; LLM('radiology-opt', mode='generate').close()"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Loading weights" not in done.stderr


@pytest.mark.parametrize("options", ["--kernels plain", "--mode generate"])
def test_what_leaves_everything_to_pytorch_calls_no_compiler(options: str, tmp_path: Path) -> None:
    compiler, called = tmp_path / "g++", tmp_path / "called"
    compiler.write_text(f"#!/bin/sh\ntouch {called}\nexit 1\n")
    compiler.chmod(0o755)
    subprocess.run(
        [sys.executable, "-m", "splitwiser", "run", "--dtype", "bf16", "--limit", "1", *options.split()],
        cwd=tmp_path, check=True, capture_output=True, timeout=100,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert not called.exists()
