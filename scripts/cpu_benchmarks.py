"""Runs the comparisons of docs/benchmarks.md on a CPU, keeps their rows in results/reference, and writes the tables.

    python scripts/cpu_benchmarks.py --peers ~/peers           # all; name some to run only these
    python scripts/cpu_benchmarks.py growth --peers ~/peers    # steps by requests and context, in 10 minutes
    python scripts/cpu_benchmarks.py --tables                  # only write the tables from the rows that are kept

Let nothing else run meanwhile; a comparison in which the machine was busy is marked so. All take about an hour and a half.
The folder of ``--peers`` holds the environments of scripts/install_peer.sh, each under its name there.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import growth
import pandas as pd
import yaml
from gpu_results import PROJECT, markdown, number, read_rows, write_sections

from splitwiser.errors import unknown_name
from splitwiser.machine.describe import git_commit
from splitwiser.study.peers.program import ENGINES

REFERENCE = PROJECT / "results" / "reference" / "cpu-2-cores"
RECORD = REFERENCE / "benchmarks.json"
KEPT = ("started", "commit", "machine", "versions", "capacity")  # of a command's record
OPT = "--model opt-125m --load_format dummy --dtype bfloat16"
LLAMA = "--model smollm2-135m --load_format dummy --dtype bfloat16"
VLLM = "--backend vllm --backend_python $PEERS/vllm"
WHOLE = f"{VLLM} --mode mp --workers"
SPLIT = f"--variant 'vllm-split: {VLLM} --mode mp'"
PLACED = (  # this project's own engine, and one and two whole engines of vLLM's, and a prefill and a decode engine
    f"--modes sequential,mp --variant 'vllm-one: {VLLM}' "
    f"--variant 'vllm-two: {WHOLE} \"[{{role: mixed, count: 2}}]\"' {SPLIT} --workload standard {OPT}"
)
FIGURES = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "TTFT p50 ms",
    "p99_ttft_ms": "TTFT p99 ms",
    "median_itl_ms": "ITL p50 ms",
    "p99_itl_ms": "ITL p99 ms",
    "requests_in_flight": "in flight",
    "peak_memory_mb": "memory MB",
    "ready_s": "ready s",
}


# ours, whose dtype is bfloat16, and the engines that a user would run instead
INT8, INT8_PEER = "--variant 'int8: --quantization int8'", "openvino-int8"
BEST_PEERS = "--peer vllm=$PEERS/vllm --peer openvino=$PEERS/openvino --peer openvino-int8=$PEERS/openvino"
OTHER_PEERS = "--peer vllm-zentorch=$PEERS/vllm-zentorch --peer pace=$PEERS/pace"
HF_PEERS = "--peer hf-generate=$PEERS/hf --peer hf-continuous=$PEERS/hf"
LLAMA_CPP = "--peer llama.cpp=$PEERS/llamacpp --peer llama.cpp-installed=$PEERS/llamacpp"
INSTALLED_PEERS = (
    "--peer vllm-installed=$PEERS/vllm --peer openvino-installed=$PEERS/openvino --peer pace-installed=$PEERS/pace"
)


@dataclass(frozen=True)
class Benchmark:
    """A comparison: what it shows, and the options of ``splitwiser compare``."""

    about: str
    options: str

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return f"splitwiser compare {self.options}"


SCHEDULES = (
    "--variant 'alternate: --schedule alternate' --variant 'hybrid: --schedule hybrid' "
    "--variant 'hybrid2048: --schedule hybrid --prefill_tokens 2048' "
    "--variant 'hybrid512: --schedule hybrid --prefill_tokens 512'"
)
BENCHMARKS = {
    "standard-opt-125m": Benchmark(
        "OPT-125m in bf16 (random weights): 64 requests at once, about 14,000 prompt tokens, 64 new tokens each.",
        f"--repeats 2 --modes sequential,generate,mp {INT8} {BEST_PEERS} {OTHER_PEERS} {INSTALLED_PEERS} "
        f"--workload standard {OPT}",
    ),
    "standard-smollm2-135m": Benchmark(
        "The same requests to a model of Llama's shape with 135 M parameters (`smollm2-135m`).",
        f"--repeats 2 --modes sequential,mp {INT8} {BEST_PEERS} {OTHER_PEERS} {INSTALLED_PEERS} "
        f"--workload standard {LLAMA}",
    ),
    "slow-peers-opt-125m": Benchmark(
        "The standard requests to OPT-125m again, beside engines that take minutes for them.",
        f"--repeats 1 --modes sequential {HF_PEERS} --workload standard {OPT}",
    ),
    "slow-peers-smollm2-135m": Benchmark(
        "The same with the model of Llama's shape, which llama.cpp serves too.",
        f"--repeats 1 --modes sequential {LLAMA_CPP} {HF_PEERS} --workload standard {LLAMA}",
    ),
    "flan-t5-base": Benchmark(
        "The same requests to an encoder-decoder (FLAN-T5 base, bf16), beside transformers' `generate`.",
        "--repeats 2 --modes sequential,generate --workload standard --model flan-t5-base --load_format dummy "
        "--dtype bfloat16",
    ),
    "falcon-rw-1b-64": Benchmark(
        "Falcon RW 1B (ALiBi, bf16): 64 requests at once of 50 prompt tokens and 16 new ones, beside transformers' "
        "`generate` and vLLM.",
        "--repeats 2 --modes sequential,generate --peer vllm=$PEERS/vllm --requests 64 --prompt_tokens 50 "
        "--output_tokens 16 --model falcon-rw-1b --load_format dummy --dtype bfloat16",
    ),
    "vllm-placed": Benchmark(
        "vLLM's engines in this project's placements: one engine, two whole engines over one copy of the weights, and a "
        "prefill and a decode engine over one KV pool. Memory counts what is shared once: N private copies would take N "
        "times that of one engine.",
        f"--repeats 2 {PLACED}",
    ),
    "vllm-placed-60": Benchmark(
        "The same as a Poisson process at 60% of the rate at which `sequential` answers them offline.",
        f"--repeats 1 --load 0.6 {PLACED}",
    ),
    "vllm-placed-80": Benchmark("The same at 80%.", f"--repeats 1 --load 0.8 {PLACED}"),
    "vllm-memory": Benchmark(
        "Memory of one, two and three whole engines of vLLM's, and of a prefill and a decode engine, with a model of 1.2 GB "
        "(Qwen3 0.6B, bf16) and 0.4 GB of KV cache for all together. N private copies would take N times that of one.",
        f"--repeats 1 --variant 'vllm-one: {VLLM}' --variant 'vllm-two: {WHOLE} \"[{{role: mixed, count: 2}}]\"' "
        f"--variant 'vllm-three: {WHOLE} \"[{{role: mixed, count: 3}}]\"' {SPLIT} --requests 12 --prompt_tokens 64 "
        "--output_tokens 8 --model qwen3-0.6b --load_format dummy --dtype bfloat16 --kv_memory 384MiB --kernels plain",
    ),
    "vllm-transfer": Benchmark(
        "A prefill and a decode engine of vLLM's over one KV pool, in which blocks change hands, and over a pool each, from "
        "one of which to the other they are copied.",
        f"--repeats 2 {SPLIT} --variant 'vllm-copy: {VLLM} --mode mp --kv_transfer copy' --workload standard {OPT}",
    ),
    "long-prompts": Benchmark(
        "16 requests of about 1,500 prompt tokens with 16 new ones.",
        f"--repeats 2 --modes sequential {INT8} {BEST_PEERS} --workload long_prompts {OPT}",
    ),
    "long-outputs": Benchmark(
        "48 requests of about 32 prompt tokens with 256 new ones.",
        f"--repeats 2 --modes sequential {INT8} {BEST_PEERS} --workload long_outputs {OPT}",
    ),
    "single": Benchmark(
        "6 requests of about 128 prompt tokens with 128 new ones, each after the one before.",
        f"--repeats 4 --modes sequential {INT8} {BEST_PEERS} --workload single {OPT}",
    ),
    "load-60": Benchmark(
        "The standard requests, as a Poisson process at 60% of the rate at which `sequential` answers them offline.",
        f"--modes sequential,mp --load 0.6 --workload standard {OPT}",
    ),
    "schedules": Benchmark(
        "The standard requests under `--schedule alternate`, and under `hybrid` with steps of the measured budget and of up "
        "to 2,048 and 512 tokens.",
        f"{SCHEDULES} --workload standard {OPT}",
    ),
    "schedules-long-prompts": Benchmark(
        "The same on 16 requests of about 1,500 prompt tokens.", f"{SCHEDULES} --workload long_prompts {OPT}"
    ),
    "schedules-long-outputs": Benchmark(
        "The same on 48 requests of about 32 prompt tokens with 256 new ones, in two rounds.",
        f"--repeats 2 {SCHEDULES} --workload long_outputs {OPT}",
    ),
    "schedules-single": Benchmark(
        "The same on 6 requests of about 128 prompt tokens with 128 new ones, each after the one before, in two rounds: a "
        "step never has both phases.",
        f"--repeats 2 {SCHEDULES} --workload single {OPT}",
    ),
    "prefix-caching": Benchmark(
        "64 reports, each behind the same four examples, with prefix caching and without.",
        "--variant 'shared: --prefix_caching' --variant 'alone: --no-prefix_caching' --case_id 4 --same_examples --limit 64 "
        f"--max_new_tokens 64 {OPT}",
    ),
    "kv-blocks": Benchmark(
        "200 reports whose answers end early, in a pool of 8 MiB: blocks as requests grow, and all reserved at admission.",
        "--variant 'on-demand: --no-reserve' --variant 'reserved: --reserve' --case_id 0 --kv_memory 8MiB",
    ),
    "embedded": Benchmark(
        "The embedded model (2.2 M parameters, float32) over the 200 test reports: mostly the cost of a step itself.",
        "--modes sequential,generate,mp --case_id 0",
    ),
}


def measure(name: str, peers: str) -> None:
    """Run the benchmark ``name`` and keep its rows and the record of where it ran."""
    benchmark = BENCHMARKS[name]
    with tempfile.TemporaryDirectory() as results:
        options = [word.replace("$PEERS", peers) for word in shlex.split(benchmark.options)]
        command = [sys.executable, "-m", "splitwiser", "compare", *options, "--results", results]
        subprocess.run(command, check=True)
        (folder,) = Path(results).glob("compare_*")
        record = yaml.safe_load((folder / "compare.yaml").read_text(encoding="utf-8"))
        shutil.copy(folder / "comparison.csv", _rows(name))
    _keep(name, benchmark.command, record)


def measure_growth(peers: str) -> None:
    """Run :mod:`growth`, and keep its rows, its picture and the record of where it ran."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        where = growth.measure(f"{peers}/{growth.PEER}", Path(folder), _rows(growth.NAME))
    _keep(growth.NAME, "python scripts/cpu_benchmarks.py growth --peers $PEERS", {"started": started, **where})


def _keep(name: str, command: str, record: Mapping[str, Any]) -> None:
    """Keep where the benchmark ``name`` ran, from a command's ``record``."""
    records = _records()
    records[name] = {"command": command, **{key: record.get(key) for key in KEPT}}
    RECORD.write_text(json.dumps(records, indent=1), encoding="utf-8")


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row a variant: medians over the rounds, for throughput with the least and the greatest, and the first
    variant's throughput over the row's, round by round."""
    finished = rows[rows["status"] == "finished"]
    by_variant = {name: own.set_index("round") for name, own in finished.groupby("variant", sort=False)}
    first = next(iter(finished["variant"]))
    lines = []
    for name, own in by_variant.items():
        line: dict[str, object] = {"variant": str(name), "rounds": len(own)}
        for column, heading in FIGURES.items():
            line[heading] = own[column].median()
        line["tokens/s"] = _range(own["output_throughput"])
        line[f"{first} over it"] = _range(by_variant[first]["output_throughput"] / own["output_throughput"])
        lines.append(line)
    return pd.DataFrame(lines)


def section() -> str:
    """Return all tables in Markdown."""
    records, blocks = _records(), []
    for name, benchmark in BENCHMARKS.items():
        if name in records:
            rows = read_rows(_rows(name))
            busy = int((rows["machine_busy"].astype(str) == "True").sum())
            note = f" The machine was busy in {busy} of {len(rows)} runs." if busy else ""
            where = f"Commit {str(records[name]['commit'])[:12]}.{note}"
            blocks += [
                f"**{name}.** {benchmark.about} {where}",
                f"```bash\n{records[name]['command']}\n```",
                markdown(table(rows)),
            ]
            if versions := _versions(rows):
                blocks.append(f"{versions}.")
    return "\n\n".join(blocks)


def ahead() -> str:
    """Return a row for each comparison with peers: the best of them, this project's throughput over that, round by round,
    and the same of int8."""
    lines = []
    for name in filter(_records().__contains__, BENCHMARKS):
        rows = read_rows(_rows(name))
        rows = rows[rows["status"] == "finished"]
        made = {
            str(each): own.set_index("round")["output_throughput"] for each, own in rows.groupby("variant", sort=False)
        }
        others = {peer: own.median() for peer, own in made.items() if peer in ENGINES and peer != INT8_PEER}
        if not others or "sequential" not in made:
            continue
        best = max(others, key=others.__getitem__)
        line = {"benchmark": name, "best of the others": best}
        for ours, theirs in (("sequential", best), ("int8", INT8_PEER), ("int8", "sequential")):
            known = ours in made and theirs in made
            heading = f"{ours} over {'it' if theirs == best else theirs}"
            line[heading] = _range(made[ours] / made[theirs]) if known else "-"
        lines.append(line)
    return markdown(pd.DataFrame(lines))


def growth_section() -> str:
    """Return the table of :mod:`growth` in Markdown, and draw its picture."""
    record = _records().get(growth.NAME)
    if record is None:
        return "Not yet measured."
    rows, picture = read_rows(_rows(growth.NAME)), REFERENCE / f"{growth.NAME}.png"
    growth.draw(rows, picture)
    place = picture.relative_to(PROJECT)
    return growth.section(rows, str(record["commit"]), str(record["command"]), f"../{place}")


def best() -> str:
    """Return the table of the README, with other engines in their best setting."""
    made = table(read_rows(_rows("standard-opt-125m")))
    made = made[~made["variant"].str.endswith("-installed")]
    return markdown(made[["variant", "tokens/s", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms", "sequential over it"]])


def _versions(rows: pd.DataFrame) -> str:
    """Return the version and the settings of each peer."""
    peers = rows[rows["version"].notna()].drop_duplicates("variant")
    return "; ".join(f"{variant}: {version}" for variant, version in peers[["variant", "version"]].to_numpy())


def _range(values: "pd.Series[float]") -> str:
    median, least, greatest = number(values.median()), number(values.min()), number(values.max())
    return median if len(values) == 1 else f"{median} ({least} to {greatest})"


def _rows(name: str) -> Path:
    return REFERENCE / f"{name}.csv"


def _records() -> dict[str, Any]:
    return dict(json.loads(RECORD.read_text(encoding="utf-8"))) if RECORD.exists() else {}


def main() -> None:
    """Measure what is asked for, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*BENCHMARKS, growth.NAME]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}; none: all")
    parser.add_argument("--peers", default="", help="folder of the peers' environments")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args()
    for name in options.names:
        if name not in names:
            raise unknown_name("benchmark", name, names)
    if commit := git_commit():  # the rows of one benchmark are no change to the next
        os.environ["SPLITWISER_COMMIT"] = commit
    for name in () if options.tables else options.names or names:
        if name == growth.NAME:
            measure_growth(options.peers)
        else:
            measure(name, options.peers)
    write_sections(
        PROJECT, {"cpu-best": best(), "cpu": section(), "cpu-ahead": ahead(), "cpu-growth": growth_section()}
    )


if __name__ == "__main__":
    main()
