"""What ``scripts/gpu_check.sh`` runs: stage after stage, each with a deadline, so that the whole ends in time.

The stages: ``splitwiser doctor``; the tests marked ``gpu``; all modes' float32 tokens against ``generate``'s; then all
modes on OPT-125m and on a model of 1.2 billion parameters (bf16, dummy weights), interleaved, with the baselines that a
split is to be held against: one process, several without MPS, several with it undivided, and divided.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

PROJECT = Path(__file__).resolve().parents[1]
TOTAL_S = 9 * 60
STOP_S = 20  # of which the last stage may take to write what it has

TWO = "--workers '[{role: mixed, count: 2}]'"
FOUR = "--workers '[{role: mixed, count: 4}]'"
SHARES = "--workers '[{role: prefill, share: 40}, {role: decode, share: 60}]'"
VARIANTS = {  # name: mode, options
    "one": ("sequential", ""),
    "one_chunked": ("sequential", "--prefill_tokens 512"),
    "two": ("mp", TWO),
    "two_mps": ("mps", f"{TWO} --share none"),
    "two_mps_50_50": ("mps", TWO),
    "split": ("mp", ""),
    "split_mps": ("mps", "--share none"),
    "split_mps_40_60": ("mps", SHARES),
    "green_undivided": ("green", "--share none"),
    "green_40_60": ("green", SHARES),
    "green_auto": ("green", "--share auto --itl_target_ms 10"),
    "generate": ("generate", ""),
    "four": ("mp", FOUR),  # for the memory of N workers
}
MODELS = {  # model: its load
    "opt-125m": "--requests 128 --prompt_tokens uniform:128:1024 --output_tokens 128",
    "llama-3.2-1b": "--requests 64 --prompt_tokens uniform:256:2048 --output_tokens 128",
}
SHOWN = {
    "output_throughput": "tokens/s out",
    "median_ttft_ms": "TTFT p50 ms",
    "median_itl_ms": "ITL p50 ms",
    "p99_itl_ms": "ITL p99 ms",
    "peak_memory_mb": "memory MB",
}


@dataclass(frozen=True)
class Stage:
    """A command, given the seconds that it may take, and the part of the time left that these are."""

    name: str
    command: Callable[[float], list[str]]
    part: float


def run_stage(stage: Stage, folder: Path, seconds: float) -> str:
    """Run it for at most ``seconds``, what it prints into ``<name>.txt``; returns how it ended."""
    began = time.monotonic()
    with (folder / f"{stage.name}.txt").open("w") as output:
        process = subprocess.Popen(stage.command(seconds), stdout=output, stderr=subprocess.STDOUT, cwd=PROJECT)
        try:
            ended = {0: "passed"}.get(process.wait(seconds), f"ended with exit code {process.returncode}")
        except subprocess.TimeoutExpired:
            process.terminate()  # a comparison then writes what it has
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            ended = f"stopped after {seconds:.0f} s"
    return f"{ended} ({time.monotonic() - began:.0f} s)"


def compare(
    folder: Path, variants: dict[str, tuple[str, str]], options: str, repeats: int = 9
) -> Callable[[float], list[str]]:
    """``splitwiser compare`` of ``variants``, as many rounds as there is time for, up to ``repeats``."""
    described = [f"{name}: --mode {mode} {own}" for name, (mode, own) in variants.items()]
    command = [
        sys.executable, "-m", "splitwiser", "compare", "--repeats", str(repeats), "--results", str(folder), *options.split(),
        *(argument for text in described for argument in ("--variant", text)),
    ]  # fmt: skip
    # a round that begins before half of the time is over should end in time
    return lambda seconds: [*command, "--minutes", f"{max(seconds, 2) / 120:.2f}"]


def working_modes(folder: Path) -> set[str]:
    """Modes that the doctor, whose finding is in ``doctor.txt``, says will work."""
    text = (folder / "doctor.txt").read_text(encoding="utf-8")
    found = json.loads(text[text.index("{") : text.rindex("}") + 1])  # warnings may stand around it
    return {mode["mode"] for mode in found["modes"] if mode["works"]}


def table(folder: Path) -> pd.DataFrame:
    """A row a model and variant: medians over the rounds that there was time for."""
    rows = []
    for path in sorted(folder.glob("compare_*/comparison.csv")):
        runs = pd.read_csv(path)
        if runs["model"].iloc[0] in MODELS:
            of_variants = runs[runs["status"] == "finished"].groupby("variant", sort=False)
            rows.append(of_variants[["model", *SHOWN]].agg({"model": "first", **dict.fromkeys(SHOWN, "median")}))
            rows[-1]["rounds"] = of_variants.size()
    return pd.concat(rows).reset_index() if rows else pd.DataFrame()


def main() -> int:
    """Run all stages; the exit code is 1 if one failed."""
    began = time.monotonic()
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    doctor = Stage("doctor", lambda _: [sys.executable, "-m", "splitwiser", "doctor", "--json"], 0.1)
    print("doctor:", run_stage(doctor, folder, 60), flush=True)
    modes = working_modes(folder)
    usable = {name: variant for name, variant in VARIANTS.items() if variant[0] in modes}
    named = ("generate", *sorted(modes - {"generate"}))
    each_mode: dict[str, tuple[str, str]] = {mode: (mode, "") for mode in named}
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", str(PROJECT / "tests")]
    stages = [
        Stage("gpu_tests", lambda _: tests, 0.4),
        Stage("tokens", compare(folder, each_mode, "--model radiology-opt --dtype float32 --limit 40", repeats=1), 0.3),
        *(
            Stage(model, compare(folder, usable, f"--model {model} --dtype bfloat16 --load_format dummy {load}"), part)
            for (model, load), part in zip(MODELS.items(), (0.5, 1.0), strict=True)
        ),
    ]
    ended = {}
    for stage in stages:
        left = TOTAL_S - STOP_S - (time.monotonic() - began)
        ended[stage.name] = run_stage(stage, folder, max(1, left * stage.part))
        print(f"{stage.name}: {ended[stage.name]}", flush=True)
    measured = table(folder)
    measured.to_csv(folder / "table.csv", index=False)
    print(measured.rename(columns=SHOWN).to_string(index=False, float_format="{:,.1f}".format))
    return int(any("exit code" in how for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
