"""Measures start-up and memory, of two checkouts in interleaved rounds: ``python scripts/startup.py [--before CHECKOUT]``.

For each job, writes a row a run into a CSV file, and prints the medians over the rounds of: seconds and processor seconds
from the command to the folder that a run makes just before its first step, peak memory in MB, tokens/s, and processor
milliseconds per token (prompt and new) of all processes from then on. Both checkouts run with this interpreter. Processor
time is more reliable than seconds on a machine that others use too.
"""

import argparse
import csv
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
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


def show(name: str, sides: Mapping[str, Sequence[tuple[float, ...]]]) -> None:
    """Print the medians over the rounds of each side, and of two their ratio, under ``name``."""
    medians = {side: [median(column) for column in zip(*rounds, strict=True)] for side, rounds in sides.items()}
    if len(medians) == 2:
        medians["ratio"] = [now / before for before, now in zip(medians["before"], medians["now"], strict=True)]
    print(f"\n{name}\n{'':8}" + "".join(f"{figure:>18}" for figure in FIGURES))
    for side, figures in medians.items():
        print(f"{side:8}" + "".join(f"{figure:>18.2f}" for figure in figures), flush=True)


def main() -> None:
    """Measure, write the rows and print the tables."""
    parser = argparse.ArgumentParser(description="Start-up and memory of this checkout, in rounds.")
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    parser.add_argument("--jobs", default="", help="only jobs whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("startup.csv"), help="gets the figures of every run")
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve()} if options.before else {}
    checkouts["now"] = PROJECT
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "checkout", "round", *FIGURES])
        for name, job in ((name, job) for name, job in JOBS.items() if options.jobs in name):
            sides: dict[str, list[tuple[float, ...]]] = {side: [] for side in checkouts}
            for number, (side, checkout) in product(range(options.rounds + 1), checkouts.items()):
                figures = measure(checkout, job)
                if number:  # the first fills caches
                    sides[side].append(figures)
                    writer.writerow([name, side, number, *(f"{figure:.4g}" for figure in figures)])
                    file.flush()
            show(name, sides)


if __name__ == "__main__":
    main()
