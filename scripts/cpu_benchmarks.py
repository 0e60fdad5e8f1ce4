"""Runs the comparisons of docs/benchmarks.md on a CPU, keeps their rows, and writes the tables. Each kind of processor has
a folder of its own in results/reference and parts of its own on the pages: what is measured on one replaces nothing of
another.

    python scripts/cpu_benchmarks.py --peers ~/peers           # all; name some to run only these
    python scripts/cpu_benchmarks.py growth --peers ~/peers    # steps by requests and context, in 10 minutes
    python scripts/cpu_benchmarks.py --tables                  # only write the tables from the rows that are kept

Let nothing else run meanwhile; a comparison in which the machine was busy is marked so. All take about two hours.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import growth
import pandas as pd
import yaml
from gpu_results import PROJECT, REFERENCE, markdown, number, read_json, read_rows, write_sections

from splitwiser.errors import unknown_name
from splitwiser.machine.describe import git_commit, kind_of_cpu
from splitwiser.study.peers.program import ENGINES

RECORD = "benchmarks.json"  # of each kind of processor: where its benchmarks ran, by name
OURS = "sequential"  # the variant that others are held against
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
INT8, INT8_KV = "--variant 'int8: --quantization int8'", "--variant 'int8-kv: --quantization int8 --kv_dtype int8'"
OURS_INT8, INT8_PEER = ("int8", "int8-kv"), "openvino-int8"  # the peer's K and V have 8 bits, too
BEST_PEERS = "--peer vllm=$PEERS/vllm --peer openvino=$PEERS/openvino --peer openvino-int8=$PEERS/openvino"
OTHER_PEERS = "--peer vllm-zentorch=$PEERS/vllm-zentorch --peer pace=$PEERS/pace"
NEAR_PEERS = f"{BEST_PEERS} --peer openvino-installed=$PEERS/openvino"
HF_PEERS = "--peer hf-generate=$PEERS/hf --peer hf-continuous=$PEERS/hf"
LLAMA_CPP = "--peer llama.cpp=$PEERS/llamacpp --peer llama.cpp-installed=$PEERS/llamacpp"
INSTALLED_PEERS = (
    "--peer vllm-installed=$PEERS/vllm --peer openvino-installed=$PEERS/openvino --peer pace-installed=$PEERS/pace"
)


@dataclass(frozen=True)
class Benchmark:
    """A comparison: what it shows, the options of ``splitwiser compare``, and settings of the environment."""

    about: str
    options: str
    environment: str = ""

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return f"{self.environment} splitwiser compare {self.options}".lstrip()


def both(name: str, about: str, options: str) -> dict[str, Benchmark]:
    """Return a benchmark for each of the two models that peers are held against."""
    return {
        f"{name}-{model}": Benchmark(f"{about} (`{model}`).", f"{options} {random}")
        for model, random in (("opt-125m", OPT), ("smollm2-135m", LLAMA))
    }


SCHEDULES = (
    "--variant 'alternate: --schedule alternate' --variant 'hybrid: --schedule hybrid' "
    "--variant 'hybrid2048: --schedule hybrid --prefill_tokens 2048' "
    "--variant 'hybrid512: --schedule hybrid --prefill_tokens 512'"
)
LESSER = (  # in float32 and bfloat16, this project's functions and PyTorch's own
    "--variant 'float32: --dtype float32' --variant 'float32-plain: --dtype float32 --kernels plain' "
    "--variant 'bfloat16: --dtype bfloat16' --variant 'bfloat16-plain: --dtype bfloat16 --kernels plain' "
    "--requests 16 --prompt_tokens 64 --output_tokens 16 --model opt-125m --load_format dummy"
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
    **both(
        "int8",
        "The standard requests in whole numbers: weights alone, and weights, K and V",
        f"--repeats 4 --modes sequential {INT8} {INT8_KV} --peer openvino-int8=$PEERS/openvino --workload standard",
    ),
    **both(
        "long-prompts",
        "16 requests of about 1,500 prompt tokens with 16 new ones",
        f"--repeats 2 --modes sequential {INT8} {NEAR_PEERS} --workload long_prompts",
    ),
    **both(
        "long-outputs",
        "48 requests of about 32 prompt tokens with 256 new ones",
        f"--repeats 2 --modes sequential {INT8} {INT8_KV} {NEAR_PEERS} --workload long_outputs",
    ),
    **both(
        "single",
        "6 requests of about 128 prompt tokens with 128 new ones, each after the one before",
        f"--repeats 4 --modes sequential {INT8} {NEAR_PEERS} --workload single",
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
    "without-avx512": Benchmark(
        "As on a processor with AVX2 and no more: 16 requests of 64 prompt tokens with 16 new ones to OPT-125m, computed "
        "by this project's functions and by PyTorch alone.",
        f"--repeats 2 {LESSER}",
        "SPLITWISER_MARCH=x86-64-v3 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2",
    ),
    "without-avx": Benchmark(
        "The same without AVX in this project's functions, PyTorch's own and oneDNN; MKL, which multiplies in float32, "
        "takes no such setting on an AMD processor.",
        f"--repeats 1 {LESSER}",
        "SPLITWISER_MARCH=x86-64 ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2",
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


def measure(name: str, peers: str, kind: Path) -> None:
    """Run the benchmark ``name`` and keep its rows and the record of where it ran in the folder ``kind``."""
    benchmark = BENCHMARKS[name]
    with tempfile.TemporaryDirectory() as results:
        options = [word.replace("$PEERS", peers) for word in shlex.split(benchmark.options)]
        command = [sys.executable, "-m", "splitwiser", "compare", *options, "--results", results]
        subprocess.run(["env", *benchmark.environment.split(), *command], check=True)
        (folder,) = Path(results).glob("compare_*")
        record = yaml.safe_load((folder / "compare.yaml").read_text(encoding="utf-8"))
        shutil.copy(folder / "comparison.csv", _rows(kind, name))
    _keep(kind, name, benchmark.command, record)


def measure_growth(peers: str, kind: Path) -> None:
    """Run :mod:`growth`, and keep its rows and the record of where it ran in the folder ``kind``."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        where = growth.measure(f"{peers}/{growth.PEER}", Path(folder), _rows(kind, growth.NAME))
    _keep(kind, growth.NAME, "python scripts/cpu_benchmarks.py growth --peers $PEERS", {"started": started, **where})


def _keep(kind: Path, name: str, command: str, record: Mapping[str, Any]) -> None:
    """Keep where the benchmark ``name`` ran, from a command's ``record``."""
    records = _records(kind)
    records[name] = {"command": command, **{key: record.get(key) for key in KEPT}}
    (kind / RECORD).write_text(json.dumps(records, indent=1), encoding="utf-8")


def kinds() -> list[Path]:
    """Return the folder of each kind of processor that something was measured on."""
    return sorted(path.parent for path in REFERENCE.glob(f"cpu-*/{RECORD}"))


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


def section(kind: Path) -> str:
    """Return what was measured on a ``kind`` of processor in Markdown: where, and all tables."""
    records = _records(kind)
    place, days = kind.relative_to(PROJECT), sorted({record["started"][:10] for record in records.values()})
    last = max(records.values(), key=lambda record: str(record["started"]))
    versions = ", ".join(f"{name} {last['versions'][name]}" for name in ("python", "torch", "transformers"))
    blocks = [
        f"### {_title(kind)}",
        f"{last['machine']['memory_gib']:.0f} GiB of memory; {versions}; {' to '.join(dict.fromkeys((days[0], days[-1])))}. "
        f"Rows in [{place}](../{place}).",
    ]
    for name, benchmark in BENCHMARKS.items():
        if name in records:
            rows = read_rows(_rows(kind, name))
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
    if record := records.get(growth.NAME):
        rows = read_rows(_rows(kind, growth.NAME))
        growth.draw(rows, kind / f"{growth.NAME}.png")
        picture = f"../{place}/{growth.NAME}.png"
        blocks.append(growth.section(rows, str(record["commit"]), str(record["command"]), picture))
    return "\n\n".join(blocks)


def ahead(kind: Path) -> str:
    """Return a row for each comparison with peers: the best of them in the dtype of this project's rows, whatever its other
    settings, this project's throughput over that, round by round, who is ahead in every round, and the same of int8: of the
    faster of this project's two settings."""
    lines = []
    for name in filter(_records(kind).__contains__, BENCHMARKS):
        rows = read_rows(_rows(kind, name))
        rows = rows[rows["status"] == "finished"]
        made = {
            str(each): own.set_index("round")["output_throughput"] for each, own in rows.groupby("variant", sort=False)
        }
        others = {peer: own.median() for peer, own in made.items() if peer in ENGINES and peer != INT8_PEER}
        if OURS not in made or (not others and INT8_PEER not in made):
            continue
        line = {"benchmark": name, "best of the others": "-", f"{OURS} over it": "-", "ahead": "-"}
        if others:
            best = max(others, key=others.__getitem__)
            ratios = made[OURS] / made[best]
            leader = OURS if ratios.min() > 1 else best if ratios.max() < 1 else "neither"
            line |= {"best of the others": best, f"{OURS} over it": _range(ratios), "ahead": leader}
        integers = [each for each in OURS_INT8 if each in made]
        fastest = max(integers, key=lambda each: made[each].median(), default="-")
        line["best of int8"] = fastest
        for theirs in (INT8_PEER, OURS):
            known = integers and theirs in made
            line[f"int8 over {theirs}"] = _range(made[fastest] / made[theirs]) if known else "-"
        lines.append(line)
    return f"{_title(kind)}:\n\n{markdown(pd.DataFrame(lines)) if lines else 'no comparison with peers yet.'}"


def best(shown: Sequence[Path]) -> str:
    """Return the table of the README under a line on what it shows: other engines in their best setting, with columns for
    each kind of processor on which its benchmark was measured."""
    name, columns = "standard-opt-125m", []
    shown = [kind for kind in shown if name in _records(kind)]
    for kind in shown:
        made = table(read_rows(_rows(kind, name))).set_index("variant")
        made = made[~made.index.str.endswith("-installed")][["tokens/s", "TTFT p50 ms", "ITL p99 ms"]]
        columns.append(made.add_suffix(f" ({_short_title(kind)})") if len(shown) > 1 else made)
    about = (
        f"OPT-125m in bf16 on {' and on '.join(map(_title, shown))}, 64 requests at once; medians over the rounds, in "
        "brackets the least and the greatest:"
    )
    return f"{about}\n\n{markdown(pd.concat(columns, axis=1).reset_index())}"


def _title(kind: Path) -> str:
    """Return the name of a ``kind`` of processor in headings."""
    machine = _machine(kind)
    generation = f" ({machine['generation']})" if machine["generation"] else ""
    return f"{machine['processor']}{generation} with {machine['instructions']}, {machine['cores']} cores"


def _short_title(kind: Path) -> str:
    """Return the name of a ``kind`` of processor in headings of columns."""
    machine = _machine(kind)
    return f"{machine['generation'] or machine['processor']}, {machine['cores']} cores"


def _machine(kind: Path) -> dict[str, Any]:
    """Return what the first record of a ``kind`` of processor says of the machine."""
    machine: dict[str, Any] = next(iter(_records(kind).values()))["machine"]
    return machine


def _versions(rows: pd.DataFrame) -> str:
    """Return the version and the settings of each peer."""
    peers = rows[rows["version"].notna()].drop_duplicates("variant")
    return "; ".join(f"{variant}: {version}" for variant, version in peers[["variant", "version"]].to_numpy())


def _range(values: "pd.Series[float]") -> str:
    median, least, greatest = number(values.median()), number(values.min()), number(values.max())
    return median if len(values) == 1 else f"{median} ({least} to {greatest})"


def _rows(kind: Path, name: str) -> Path:
    return kind / f"{name}.csv"


def _records(kind: Path) -> dict[str, Any]:
    return read_json(kind / RECORD)


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
    here = REFERENCE / kind_of_cpu()
    for name in () if options.tables else options.names or names:
        here.mkdir(exist_ok=True)
        if name == growth.NAME:
            measure_growth(options.peers, here)
        else:
            measure(name, options.peers, here)
    shown = kinds()
    parts = {"cpu": section, "cpu-ahead": ahead}
    write_sections(
        PROJECT, {"cpu-best": best(shown)} | {mark: "\n\n".join(map(part, shown)) for mark, part in parts.items()}
    )


if __name__ == "__main__":
    main()
