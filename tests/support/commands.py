"""The command in a process of its own, what it is given and what it leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

COMMAND = [sys.executable, "-m", "splitwiser"]


def splitwiser(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
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
