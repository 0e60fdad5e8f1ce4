"""Modes against each other on one workload, interleaved in rounds so that a drift of the machine falls on all alike.

    python scripts/benchmark.py --modes generate,sequential,mp --repeats 3
    python scripts/benchmark.py --modes sequential,mp --repeats 3 --load 0.6

The workload is seeded: log-normal prompt lengths, every request with the same number of new tokens. Without --load all
requests arrive at once; with it they arrive as a Poisson process at that fraction of the rate at which the first mode but
``generate`` answers them offline, which is measured first. Each run is a fresh process. Writes benchmark.csv (a row a
run, the columns of throughput.csv) and summary.csv (a row a mode) into --out, and prints the latter.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

SHOWN = {  # column of throughput.csv: heading
    "output_throughput": "tokens/s out",
    "median_ttft_ms": "TTFT p50 ms",
    "p99_ttft_ms": "TTFT p99 ms",
    "median_itl_ms": "ITL p50 ms",
    "p99_itl_ms": "ITL p99 ms",
    "median_handoff_ms": "handoff p50 ms",
}


def make_workload(path: Path, options: argparse.Namespace, rate: float | None) -> None:
    """Write the workload file; ``rate`` is requests per second of the Poisson process, None for all at once."""
    rng = random.Random(options.seed)
    prompts = []
    for _ in range(options.requests):
        length = int(min(options.longest, max(16, rng.lognormvariate(options.mu, options.sigma))))
        prompts.append([rng.randint(4, 49_000) for _ in range(length)])
    content: dict[str, object] = {"max_new_tokens": options.new_tokens, "prompts": prompts}
    if rate is not None:
        moment, arrivals = 0.0, []
        for _ in prompts:
            arrivals.append(moment)
            moment += rng.expovariate(rate)
        content["arrival_s"] = arrivals
    path.write_text(json.dumps(content), encoding="utf-8")


def run(mode: str, workload: Path | None, options: argparse.Namespace, extra: list[str]) -> pd.DataFrame:
    """Run one mode in a fresh process; its row of ``throughput.csv``."""
    results = options.out / "runs"
    before = set(results.glob("*/throughput.csv"))
    command = [
        sys.executable, "-m", "splitwiser", "run", "--mode", mode,
        *(["--case_id", str(options.case_id)] if workload is None else ["--workload", str(workload), "--ignore_eos"]),
        "--model", options.model, "--load_format", options.load_format, "--dtype", options.dtype,
        "--results", str(results), *extra,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"benchmark: mode {mode} ended with exit code {done.returncode}: {done.stderr.splitlines()[-1]}"
        )
    (written,) = set(results.glob("*/throughput.csv")) - before
    return pd.read_csv(written)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a mode: medians with their least and greatest, and throughput against the first mode, round by round."""
    modes = list(dict.fromkeys(rows["mode"]))
    throughput = {
        mode: rows[rows["mode"] == mode].sort_values("round")["output_throughput"].to_numpy() for mode in modes
    }
    table = []
    for mode in modes:
        of_mode = rows[rows["mode"] == mode]
        ratios = pd.Series(throughput[mode] / throughput[modes[0]])
        row = {"mode": mode}
        for column, heading in SHOWN.items():
            values = of_mode[column]
            row[heading] = f"{values.median():.1f} ({values.min():.1f} to {values.max():.1f})"
        row[f"throughput over {modes[0]}"] = f"{ratios.median():.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        table.append(row)
    return pd.DataFrame(table)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="generate,sequential,mp", help="in the order of each round")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--load_format", default="dummy")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--mu", type=float, default=5.3, help="mean of the logarithm of prompt lengths")
    parser.add_argument("--sigma", type=float, default=0.6, help="its standard deviation")
    parser.add_argument("--longest", type=int, default=900, help="longest prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case_id", type=int, help="instead of the workload, this case over the shipped data")
    parser.add_argument("--load", type=float, help="Poisson arrivals at this fraction of capacity")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark"))
    options, extra = parser.parse_known_args()
    options.extra = extra  # to `splitwiser run`, such as --prefill_tokens 512
    return options


def main() -> None:
    """Run the benchmark."""
    options = parse()
    modes = options.modes.split(",")
    options.out.mkdir(parents=True, exist_ok=True)
    workload = None if options.case_id is not None else options.out / "workload.json"
    rate = None
    if workload and options.load is not None:
        make_workload(workload, options, None)
        probe = next(mode for mode in modes if mode != "generate")
        rate = options.load * float(run(probe, workload, options, options.extra)["request_throughput"].iloc[0])
        print(f"arrivals at {rate:.3f} requests/s: {options.load:.0%} of what {probe} answers offline")
    if workload:
        make_workload(workload, options, rate)
    rows = []
    with tqdm(total=options.repeats * len(modes), unit="run") as bar:
        for number in range(options.repeats):
            for mode in modes:
                rows.append(run(mode, workload, options, options.extra).assign(round=number, arrival_rate=rate))
                pd.concat(rows).to_csv(options.out / "benchmark.csv", index=False)
                bar.update()
    summary = summarise(pd.concat(rows))
    summary.to_csv(options.out / "summary.csv", index=False)
    print(summary.to_string(index=False))


if __name__ == "__main__":
    main()
