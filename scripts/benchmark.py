"""Modes, and other engines, against each other, interleaved in rounds so that a drift of the machine falls on all alike.

    python scripts/benchmark.py --modes generate,sequential,mp --repeats 3
    python scripts/benchmark.py --modes sequential,mp --repeats 3 --load 0.6
    python scripts/benchmark.py --models opt-125m,smollm2-135m --workloads standard,long_prompts,long_outputs,single \\
        --peers vllm=ENV,hf-continuous=ENV

Workloads are seeded: log-normal prompt lengths, every request with the same number of new tokens. Without --load all
requests arrive at once (``single``: each when the last has ended); with it they arrive as a Poisson process at that fraction
of the rate at which the first mode but ``generate`` answers them offline, which is measured first. Each run is a fresh
process. A peer is an engine of scripts/peer.py, in the environment that scripts/install_peer.sh made for it. With peers, the
model's random weights are saved once as a checkpoint, which all load. Options not listed go to ``splitwiser run``.

Writes benchmark.csv (a row a run, as it ends: the columns of throughput.csv) and summary.csv (a row a model, workload and
contestant: medians with least and greatest, the throughput of the first mode but ``generate`` over the contestant's, round
by round, and what that decides) into --out, and prints the latter. A run that fails is named and the others go on; the exit
code is then 1.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from splitwiser.check import check
from splitwiser.config import RunConfig
from splitwiser.errors import InputError, RunError, SplitwiserError, unknown
from splitwiser.machine.load import MachineLoad, Stretch
from splitwiser.model.catalog import resolve_model
from splitwiser.options import parse_options
from splitwiser.results.busy import busy_runs
from splitwiser.study.fresh_runs import Outcome, RoundsBar, run_once, run_process, write_rows
from splitwiser.study.paired import decide, round_ratios

PROJECT = Path(__file__).resolve().parents[1]
PEERS = ("vllm", "hf-continuous")
SHOWN = {  # column of throughput.csv: heading
    "output_throughput": "tokens/s out",
    "median_ttft_ms": "TTFT p50 ms",
    "p99_ttft_ms": "TTFT p99 ms",
    "median_itl_ms": "ITL p50 ms",
    "p99_itl_ms": "ITL p99 ms",
    "median_handoff_ms": "handoff p50 ms",
    "ready_s": "ready s",
}


@dataclass(frozen=True)
class Shape:
    """A workload: prompt lengths are log-normal, ``mu`` and ``sigma`` of the logarithm, from 16 to ``longest``.
    ``max_concurrency`` requests are in flight at a time; None: all arrive at once."""

    requests: int
    mu: float
    sigma: float
    longest: int
    new_tokens: int
    max_concurrency: int | None = None


WORKLOADS = {
    "standard": Shape(64, 5.3, 0.6, 900, 64),  # about 200 tokens a prompt
    "long_prompts": Shape(16, 7.3, 0.1, 1900, 16),  # about 1,500
    "long_outputs": Shape(48, 3.45, 0.15, 64, 256),  # about 32
    "single": Shape(6, 4.85, 0.15, 256, 128, max_concurrency=1),  # about 128
}
SIZES = [field.name for field in fields(Shape) if field.name != "max_concurrency"]  # those that an option overrides


@dataclass(frozen=True)
class Job:
    """What all contestants are asked: ``asked`` are the options of ``splitwiser run`` that say so."""

    model: str
    workload: str
    asked: dict[str, Any]
    arrival_rate: float | None = None


def write_workload(path: Path, shape: Shape, seed: int, rate: float | None = None) -> None:
    """Write the workload file; ``rate`` is requests per second of the Poisson process, None for all at once."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(shape.requests):
        length = int(min(shape.longest, max(16, rng.lognormvariate(shape.mu, shape.sigma))))
        prompts.append([rng.randint(4, 49_000) for _ in range(length)])
    content: dict[str, object] = {"max_new_tokens": shape.new_tokens, "prompts": prompts}
    if rate is not None:
        moment, arrivals = 0.0, []
        for _ in prompts:
            arrivals.append(moment)
            moment += rng.expovariate(rate)
        content["arrival_s"] = arrivals
    path.write_text(json.dumps(content), encoding="utf-8")


def write_checkpoint(model: str, dtype: str, out: Path) -> str:
    """The directory of a checkpoint of ``model`` with random weights of seed 0, saved at the first call."""
    directory = out / "models" / f"{resolve_model(model).name}-{dtype}"
    if not directory.exists():
        from splitwiser.model.loading import load_model

        unfinished = directory.with_name(f"{directory.name}.unfinished")
        load_model(model, dtype=dtype, device="cpu", load_format="dummy", seed=0).module.save_pretrained(unfinished)
        unfinished.rename(directory)
    return str(directory)


def make_jobs(options: argparse.Namespace) -> Iterator[Job]:
    """The models and workloads asked for, with their files."""
    for model in options.models:
        asked = {"model": model, "load_format": options.load_format, "dtype": options.dtype}
        if options.peers:
            is_dummy = options.load_format == "dummy"
            asked["model"] = (
                write_checkpoint(model, options.dtype, options.out) if is_dummy else resolve_model(model).location
            )
            asked["load_format"] = "auto"
        name = resolve_model(model).name
        if options.case_id is not None:
            yield Job(name, f"case {options.case_id}", {**asked, "case_id": options.case_id})
            continue
        for workload, shape in options.shapes.items():
            path = options.out / f"{workload}.json"
            write_workload(path, shape, options.seed)
            asked = {**asked, "workload": str(path), "ignore_eos": True, "max_concurrency": shape.max_concurrency}
            yield Job(name, workload, asked)


def run_mode(mode: str, job: Job, options: argparse.Namespace, label: str, bar: RoundsBar) -> Outcome:
    """A mode over ``job``, in a process of its own."""
    return run_once({"mode": mode, **job.asked, **options.extra}, options.out, label, bar.show)


def run_peer(peer: str, job: Job, options: argparse.Namespace, label: str, bar: RoundsBar) -> Outcome:
    """A peer over ``job``, in a process and with the environment of its own."""
    log, output = options.out / "logs" / f"{label}.log", options.out / "runs" / f"{label}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    concurrency = job.asked["max_concurrency"]
    command = [
        "env", f"PYTHONPATH={PROJECT / 'src'}", str(options.peers[peer]),
        str(PROJECT / "scripts" / "peer.py"), peer, "--model", job.asked["model"], "--workload", job.asked["workload"],
        "--dtype", options.dtype, "--output", str(output),
        *([] if concurrency is None else ["--max_concurrency", str(concurrency)]),
    ]  # fmt: skip
    stretch = Stretch()
    returncode = run_process(command, log, bar.show)
    load = MachineLoad(during=stretch.end()).columns
    if returncode or not output.exists():
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return Outcome("failed", f"exit code {returncode}: {said[-1].strip() if said else 'it said nothing'}")
    figures = json.loads(output.read_text(encoding="utf-8")) | load
    return Outcome("finished", figures={name: "" if value is None else str(value) for name, value in figures.items()})


def at_load(job: Job, base: str, options: argparse.Namespace, bar: RoundsBar) -> Job:
    """``job`` with Poisson arrivals at ``--load`` of what mode ``base`` answers when all requests arrive at once."""
    bar.begin(f"capacity of {base}, {job.model}, {job.workload}")
    outcome = run_mode(base, job, options, f"capacity_{job.model}_{job.workload}", bar)
    if outcome.status == "failed":
        raise RunError(f"mode {base}, whose capacity --load is of, failed: {outcome.error}")
    rate = options.load * float(outcome.figures["request_throughput"])
    print(f"{job.model}, {job.workload}: arrivals at {rate:.3f} requests/s, {options.load:.0%} of what {base} answers")
    path = options.out / f"{job.model}_{job.workload}.json"
    write_workload(path, options.shapes[job.workload], options.seed, rate)
    return replace(job, asked={**job.asked, "workload": str(path)}, arrival_rate=rate)


def summarise(rows: pd.DataFrame, base: str) -> pd.DataFrame:
    """A row a model, workload and contestant: medians of the finished runs with their least and greatest, and the
    throughput of ``base`` over the contestant's, round by round, and what that makes of ``base``."""
    table = []
    finished = rows[rows["status"] == "finished"]
    for (model, workload), of_job in finished.groupby(["model", "workload"], sort=False):
        throughput = {
            str(name): own.set_index("round")["output_throughput"]
            for name, own in of_job.groupby("contestant", sort=False)
        }
        for contestant, own in throughput.items():
            runs = of_job[of_job["contestant"] == contestant]
            row = {"model": model, "workload": workload, "contestant": contestant}
            row |= {SHOWN[name]: spread(runs[name].dropna().tolist(), 1) for name in SHOWN if name in runs}
            ratios = round_ratios(throughput[base], own) if base in throughput else {}
            row[f"{base} over it"] = spread(list(ratios.values()), 2)
            busy = busy_runs(of_job[of_job["contestant"].isin([base, contestant])])["round"]
            row[f"{base} is"] = (contestant != base and decide("output_throughput", ratios, set(busy))) or "-"
            table.append(row)
    return pd.DataFrame(table)


def spread(values: Sequence[float], digits: int) -> str:
    """Median (least to greatest), or a dash for nothing."""
    if not values:
        return "-"
    return f"{pd.Series(values).median():.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises :class:`InputError`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--modes", default="generate,sequential,mp", help="in the order of each round")
    parser.add_argument("--peers", default="", help="NAME=ENVIRONMENT,... (or its Python): " + " or ".join(PEERS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--models", "--model", default="opt-125m", help="one or more")
    parser.add_argument("--load_format", default="dummy")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workloads", default="standard", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--requests", type=int, help="instead of the workload's own, as all that follow")
    parser.add_argument("--new_tokens", type=int)
    parser.add_argument("--mu", type=float, help="mean of the logarithm of prompt lengths")
    parser.add_argument("--sigma", type=float, help="its standard deviation")
    parser.add_argument("--longest", type=int, help="longest prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case_id", type=int, help="instead of workloads, this case over the shipped data")
    parser.add_argument("--load", type=float, help="Poisson arrivals at this fraction of capacity")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark"))
    options, extra = parser.parse_known_args(arguments)
    options.extra = parse_options(extra, RunConfig)  # to `splitwiser run`, such as --prefill_tokens 512
    options.modes, options.models = names(options.modes), names(options.models)
    options.peers = dict(map(read_peer, names(options.peers)))
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    options.shapes = {name: replace(find_shape(name), **given) for name in names(options.workloads)}
    for own in ("mode", "workload", "results"):
        if own in options.extra:
            raise InputError(f"--{own} is the benchmark's to give; it has --modes, --workloads and --out")
    if options.repeats < 1:
        raise InputError(f"--repeats must be 1 or more, not {options.repeats}")
    if not options.modes and not options.peers:
        raise InputError("nothing to run; name modes with --modes or peers with --peers")
    if options.peers and (options.case_id is not None or options.load is not None):
        raise InputError("--peers take workloads that arrive at once; leave --case_id and --load out")
    if options.load is not None:
        if not options.load > 0:
            raise InputError(f"--load must be above 0, not {options.load:g}")
        if options.case_id is not None or any(shape.max_concurrency for shape in options.shapes.values()):
            raise InputError("--load is of workloads whose requests are not held back: not of --case_id or single")
    return options


def names(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def find_shape(name: str) -> Shape:
    """The workload ``name``. Raises :class:`InputError`."""
    if name not in WORKLOADS:
        raise unknown("workload", name, WORKLOADS)
    return WORKLOADS[name]


def read_peer(text: str) -> tuple[str, Path]:
    """Name and interpreter of a peer given as NAME=ENVIRONMENT or NAME=PYTHON. Raises :class:`InputError`."""
    name, _, where = text.partition("=")
    if name not in PEERS:
        raise unknown("peer", name, PEERS)
    python = Path(where) if Path(where).is_file() else Path(where) / "bin" / "python"
    if not python.exists():
        raise InputError(f"--peers {text}: no bin/python there; scripts/install_peer.sh makes an environment")
    return name, python


def benchmark(options: argparse.Namespace) -> None:
    """Run the benchmark. Raises :class:`InputError` before the first run, :class:`RunError` if a run failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = list(make_jobs(options))
    for job in jobs:
        for mode in options.modes:
            check(RunConfig(**{"mode": mode, **job.asked, **options.extra}))
    contestants = [*options.modes, *options.peers]
    base = next((mode for mode in options.modes if mode != "generate"), contestants[0])
    rows: list[dict[str, Any]] = []
    try:
        with RoundsBar(options.repeats * len(jobs) * len(contestants)) as bar:
            if options.load is not None:
                jobs = [at_load(job, base, options, bar) for job in jobs]
            for number in range(options.repeats):
                for job in jobs:
                    for name in contestants:
                        what = {"round": number, "model": job.model, "workload": job.workload, "contestant": name}
                        bar.begin(", ".join(["round " + str(number + 1), job.model, job.workload, name]))
                        run = run_peer if name in options.peers else run_mode
                        outcome = run(name, job, options, "_".join(map(str, what.values())), bar)
                        rows.append({**what, **outcome.row, "model": job.model, "arrival_rate": job.arrival_rate})
                        write_rows(options.out / "benchmark.csv", rows)
                        bar.end(outcome)
    finally:
        failed = sum(row["status"] == "failed" for row in rows)
        if failed < len(rows):
            summary = summarise(pd.read_csv(options.out / "benchmark.csv"), base)
            summary.to_csv(options.out / "summary.csv", index=False)
            print(summary.to_string(index=False))
    if failed:
        raise RunError(f"{failed} of {len(rows)} runs failed; see {options.out / 'logs'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; its exit code is 0, 1 for a run that failed, 2 for a wrong input, 130 after Ctrl-C."""
    try:
        benchmark(parse(arguments))
    except SplitwiserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("benchmark: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
