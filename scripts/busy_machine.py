"""Measures the throughput of each mode on an idle machine, and beside processes that only spin.

    python scripts/busy_machine.py --before ../older_checkout
    python scripts/busy_machine.py --before ../older --now ../newer --jobs single-opt-125m --modes sequential --busy_rounds 0

Every mode of every job is loaded once for each side, --now (this checkout) and, with --before, another one; then the sides
answer the same requests in turn, so that a drift of the machine affects both. First nothing else runs, then --spinning
processes do. Writes busy_machine.csv (one row per turn) into --out and prints two tables in Markdown: medians, and the
median, minimum and maximum ratio over rounds. The fair share of N cores beside K spinning processes is N / (N + K) of the
throughput alone.
"""

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

PROJECT = Path(__file__).resolve().parents[1]
READY = "ready"


def short(rng: random.Random) -> int:
    """Return the tokens of a prompt with which a job takes half a second to a second, alone."""
    return rng.randint(40, 160)


def standard(rng: random.Random) -> int:
    """Return the tokens of a prompt of the workload ``standard``."""
    return min(900, round(rng.lognormvariate(math.log(200), 0.6)))


# model, data type, requests, what draws the tokens of each prompt, new tokens
JOBS = {
    "radiology-opt": ("radiology-opt", "float32", 100, short, 16),
    "opt-125m": ("opt-125m", "bfloat16", 8, short, 16),
    "smollm2-135m": ("smollm2-135m", "bfloat16", 8, short, 16),
    **{
        f"{name}-{model}": (model, "bfloat16", *job)
        for model in ("opt-125m", "smollm2-135m")
        for name, job in {
            "standard": (64, standard, 64),
            "single": (1, lambda _: 128, 128),
            "long-prompts": (8, lambda _: 1500, 16),
        }.items()
    },
}


def serve(job: str, mode: str) -> None:
    """Load the model, and answer the requests once per line of stdin; prints the tokens per second of each time."""
    from splitwiser import LLM, SamplingParams

    model, dtype, requests, draw, new_tokens = JOBS[job]
    rng = random.Random(0)
    load_format = "auto" if model == "radiology-opt" else "dummy"
    with LLM(model, mode=mode, dtype=dtype, load_format=load_format) as llm:
        vocabulary = llm.model.vocabulary
        prompts = [[rng.randrange(4, vocabulary) for _ in range(draw(rng))] for _ in range(requests)]
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        llm.generate(prompts, params)
        print(READY, flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            llm.generate(prompts, params)
            print(requests * new_tokens / (time.perf_counter() - began), flush=True)


class Side:
    """A server process that runs one job and mode from one checkout."""

    def __init__(self, name: str, checkout: Path, job: str, mode: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", job, mode], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(checkout / "src")},
        )  # fmt: skip
        if self._read() != READY:
            raise SystemExit(f"busy_machine: {name} cannot load {job} in mode {mode}")

    def measure(self) -> float:
        """Return the tokens per second of one turn."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Run ``count`` spinning processes during the block. They stay in this session, since Linux shares cores by session."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(1.0 if count else 0.0)
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """Measure all turns; returns the rows of busy_machine.csv."""
    from splitwiser.files import write_rows

    sides = {"now": options.now.resolve(), **({"before": options.before.resolve()} if options.before else {})}
    loads = {0: options.rounds, options.spinning: options.busy_rounds}
    rows: list[dict[str, object]] = []
    pairs = [(job, mode) for job in options.jobs for mode in options.modes]
    options.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(pairs) * len(sides) * sum(loads.values()), unit="turn") as bar:
        for job, mode in pairs:
            with ExitStack() as stack:
                servers = [Side(name, checkout, job, mode) for name, checkout in sides.items()]
                for server in servers:
                    stack.callback(server.close)
                for load, rounds in loads.items():
                    if not rounds:
                        continue
                    with spinning(load):
                        for number in range(rounds):
                            for server in servers[:: 1 if number % 2 else -1]:
                                bar.set_postfix_str(f"{job}, {mode}, {server.name}, {load} spinning")
                                row = {"job": job, "mode": mode, "side": server.name, "spinning": load}
                                rows.append({**row, "round": number, "tokens_per_s": server.measure()})
                                write_rows(options.out / "busy_machine.csv", list(rows[0]), rows)
                                bar.update()
    return rows


def tables(rows: Sequence[dict[str, object]], cores: int) -> str:
    """Return the two tables in Markdown."""
    values: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        key = row["spinning"], row["job"], row["mode"], row["side"]
        values.setdefault(key, []).append(float(str(row["tokens_per_s"])))
    lines = []
    for load in dict.fromkeys(key[0] for key in values):
        fair = "" if not load else " fair share | of the fair share |"
        lines += ["", f"| {load} spinning, tokens/s | now | before | now / before |{fair}"]
        lines += ["|---|---|---|---|" + ("---|---|" if load else "")]
        for _, job, mode, _ in [key for key in values if key[0] == load and key[3] == "now"]:
            now, before = (values.get((load, job, mode, side), []) for side in ("now", "before"))
            cells = [f"{job}, {mode}", f"{statistics.median(now):,.0f}"]
            cells += [f"{statistics.median(before):,.0f}" if before else "", _ratios(now, before) if before else ""]
            if load:
                share = statistics.median(values[0, job, mode, "now"]) * cores / (cores + int(str(load)))
                cells += [f"{share:,.0f}", f"{statistics.median(now) / share:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratios(now: Sequence[float], before: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(now, before, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--jobs", type=lambda text: text.split(","), default=list(JOBS)[:3], help="some of " + ", ".join(JOBS)
    )
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["generate", "sequential", "mp"])
    parser.add_argument("--rounds", type=int, default=15, help="rounds on the idle machine")
    parser.add_argument("--busy_rounds", type=int, default=2, help="rounds beside spinning processes")
    parser.add_argument("--spinning", type=int, default=8, help="spinning processes")
    parser.add_argument("--now", type=Path, default=PROJECT, help="the checkout of this project to measure")
    parser.add_argument("--before", type=Path, help="another one, measured in turns with it")
    parser.add_argument("--out", type=Path, default=Path("busy_machine"), help="folder for busy_machine.csv")
    parser.add_argument("--serve", nargs=2, metavar=("JOB", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    from splitwiser.machine.describe import git_commit  # not at the top: the other checkout runs this script too

    if unknown := set(options.jobs) - set(JOBS):
        parser.error(f"no job {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
    cores = len(os.sched_getaffinity(0))
    rows = measure(options)
    print(f"commit {git_commit()}, {cores} cores")
    print(tables(rows, cores))


if __name__ == "__main__":
    main()
