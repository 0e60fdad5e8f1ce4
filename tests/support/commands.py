"""The command, what it is given and what it leaves."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas as pd

from splitwiser import cli

COMMAND = [sys.executable, "-m", "splitwiser"]


def invoke(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has imported torch and transformers already."""
    output, errors = io.StringIO(), io.StringIO()
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            exit_code = cli.main([*map(str, arguments)])
    except SystemExit as ended:  # argparse's
        exit_code = int(ended.code or 0)
    finally:
        signal.signal(signal.SIGTERM, terminated)
    return subprocess.CompletedProcess(arguments, exit_code, output.getvalue(), errors.getvalue())


def run_here(arguments: Sequence[str], log: Path, _: Callable[[str], None]) -> int:
    """Execute a run of a comparison, a sweep or an advice (:data:`splitwiser.study.fresh_runs.Execute`) in this process."""
    done = invoke(*arguments)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout + done.stderr)
    return done.returncode


def splitwiser(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, **environment},
    )


def write_workload(path: Path, prompts: Sequence[object], new_tokens: int = 4, **fields: object) -> Path:
    path.write_text(json.dumps({"max_new_tokens": new_tokens, "prompts": prompts, **fields}))
    return path


def only_run(results: Path) -> Path:
    (directory,) = (path for path in results.iterdir() if path.is_dir())
    return directory


def finished(results: Path) -> list[int]:
    return sorted(pd.read_csv(only_run(results) / "latency.csv").request_id)
