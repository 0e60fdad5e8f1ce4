"""Measures start-up and memory of two checkouts in interleaved rounds: ``python scripts/startup.py --before CHECKOUT``.

For each job, prints the medians over the rounds of: seconds and processor seconds from the command to the folder that a
run makes just before its first step, peak memory in MB, tokens/s, and processor milliseconds per token (prompt and new) of
all processes from then on. Both checkouts run with this interpreter. Processor time is more reliable than seconds on a
machine that others use too.
"""

import argparse
import csv
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import psutil

PROJECT = Path(__file__).resolve().parents[1]
OPT = "--model opt-125m --load_format dummy"
LOAD = f"{OPT} --prompt_tokens 200 --output_tokens 16 --requests 32 --mode mp"
JOBS = {
    "embedded, sequential": "--limit 2",
    "embedded, mp": "--limit 2 --mode mp",
    "opt-125m bfloat16, sequential": f"{OPT} --dtype bfloat16 --prompt_tokens 100 --output_tokens 16 --requests 2",
    "opt-125m float32, 1 mixed worker": f"{LOAD} --workers '[{{role: mixed}}]'",
    "opt-125m float32, 4 mixed workers": f"{LOAD} --workers '[{{role: mixed, count: 4}}]'",
}
FIGURES = ("to first step, s", "processor, s", "memory, MB", "tokens/s", "ms/token")


def measure(checkout: Path, job: str) -> tuple[float, ...]:
    """Run ``job`` with the code of ``checkout``; return :data:`FIGURES`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "splitwiser", "run", *shlex.split(job), "--results", folder]
        began = time.monotonic()
        with Path(folder, "log").open("w") as log:
            environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
            process = psutil.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        started, before, used = 0.0, 0.0, 0.0
        while process.poll() is None:
            used = max(used, processor_s(process))  # falls where a worker ends
            if not started and any(Path(folder).glob("*_*Z")):
                started, before = time.monotonic() - began, used
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(Path(folder, "log").read_text())
        with Path(folder, "runs.csv").open(encoding="utf-8") as file:
            row = next(csv.DictReader(file))
        tokens = int(row["total_input_tokens"]) + int(row["total_output_tokens"])
        memory, throughput = float(row["peak_memory_mb"]), float(row["output_throughput"])
        return started, before, memory, throughput, 1000 * (used - before) / tokens


def processor_s(process: psutil.Process) -> float:
    """Return the processor seconds that ``process`` and its descendants have used."""
    total = 0.0
    try:
        for each in [process, *process.children(recursive=True)]:
            times = each.cpu_times()
            total += times.user + times.system
    except psutil.Error:  # one has just ended
        return 0.0
    return total


def show(name: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table of ``rows`` under ``name``."""
    print(f"\n{name}\n{'':8}" + "".join(f"{figure:>18}" for figure in FIGURES))
    for title, *values in rows:
        print(f"{title:8}" + "".join(f"{value:>18}" for value in values), flush=True)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description="Start-up and memory of two checkouts, in interleaved rounds.")
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    parser.add_argument("--jobs", default="", help="only jobs whose name contains this")
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve(), "now": PROJECT}
    for name, job in ((name, job) for name, job in JOBS.items() if options.jobs in name):
        rounds = [{each: measure(checkouts[each], job) for each in checkouts} for _ in range(options.rounds + 1)][1:]
        before, now = (
            [median(row) for row in zip(*(each[which] for each in rounds), strict=True)] for which in checkouts
        )
        ratios = [f"{later / earlier:.2f}" for earlier, later in zip(before, now, strict=True)]
        tables = [("before", before), ("now", now)]
        show(name, [*((title, *(f"{value:.2f}" for value in row)) for title, row in tables), ("ratio", *ratios)])


if __name__ == "__main__":
    main()
