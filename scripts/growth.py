"""How the cost of a step grows with the requests that run and with their context, beside a peer: what
``scripts/cpu_benchmarks.py growth`` runs.

Each point is a run of its own of either engine, in turns, whose requests all arrive at once and are generated together. What
a step takes is the time between tokens while every request generates, so prompts are not in it.
"""

import json
import random
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from gpu_results import markdown, number

from splitwiser.config import RunConfig
from splitwiser.files import write_rows
from splitwiser.model.loading import load_model
from splitwiser.results.record import read_environment
from splitwiser.results.report.plots import colours_of
from splitwiser.study.fresh_runs import RoundsBar, run_once
from splitwiser.study.peers.engine import STEP_TOKENS
from splitwiser.study.peers.run import MODELS, read_peer, run_peer

NAME = "growth"
MODEL, DTYPE = "smollm2-135m", "bfloat16"
PEER = "openvino"
RUNNING = (1, 4, 16, 64, 128)  # requests
CONTEXTS = (128, 512, 2048, 8192)  # tokens of a request at its end
MOST_TOKENS = 65_536  # of all requests of a point, so that reading their prompts takes less than a minute
STEPS = 24  # least number of steps with all requests
OURS, STEP_MS, PER_S, RATIO = "sequential", "full_batch_itl_ms", "tokens/s", "step over the peer's"
MOST = 1.1  # times the peer's step is what a step should take at most
STYLES: dict[str, tuple[str, Literal["solid", "dashed"]]] = {OURS: ("o", "solid"), PEER: ("s", "dashed")}
COLUMNS = ("running", "context", "variant", "status", "error", "version", STEP_MS, "median_ttft_ms", "machine_busy")
ABOUT = (
    f"`{MODEL}` in bf16 (random weights): what a decode step takes while as many requests run as said, each with that many "
    "tokens of context, and the tokens that it makes a second."
)


def points() -> list[tuple[int, int]]:
    """Return the running requests and the context of each point."""
    return [(running, context) for context in CONTEXTS for running in RUNNING if running * context <= MOST_TOKENS]


def requests(running: int, context: int, vocabulary: int) -> dict[str, Any]:
    """Return a workload file's content: requests with ``context`` tokens in the end, new ones among them. The sooner the
    prompt of one is read, the more it generates, so that none is through before all generate."""
    draw = random.Random(f"{running} {context}")
    new = [STEPS + 1 + -(-(running - 1 - number) * context // STEP_TOKENS) for number in range(running)]
    prompts = [[draw.randrange(vocabulary) for _ in range(context - each)] for each in new]
    return {"max_new_tokens": new, "prompts": prompts}


def measure(environment: str, folder: Path, rows_path: Path) -> dict[str, Any]:
    """Run all points with this project's engine and with the peer in ``environment``, write their rows, and return the
    sections of a record that say where they ran. ``folder`` is for what the runs leave."""
    peer = read_peer(f"{PEER}={environment}")
    checkpoint = folder / MODELS / MODEL
    module = load_model(MODEL, models=RunConfig().models, dtype=DTYPE, device="cpu", load_format="dummy", seed=0).module
    module.save_pretrained(checkpoint)
    rows: list[dict[str, Any]] = []
    where: dict[str, Any] = {}
    chosen = points()
    with RoundsBar(2 * len(chosen)) as bar:
        for running, context in chosen:
            label = f"{running}x{context}"
            workload = folder / f"{label}.json"
            workload.write_text(json.dumps(requests(running, context, module.config.vocab_size)), encoding="utf-8")
            options: dict[str, Any] = {"model": str(checkpoint), "workload": str(workload), "dtype": DTYPE}
            options |= {"ignore_eos": True, "max_batch": running}
            for variant in (OURS, PEER):
                bar.begin(f"{label}, {variant}")
                if variant == PEER:
                    outcome = run_peer(peer, RunConfig(**options), folder, f"{label}_{PEER}", bar.show)
                else:
                    outcome = run_once(options, folder, f"{label}_{OURS}", bar.show)
                    if not where and outcome.directory is not None and outcome.status == "finished":
                        where = read_environment(outcome.directory / "run.yaml")
                rows.append({"running": running, "context": context, "variant": variant, **outcome.row})
                write_rows(rows_path, COLUMNS, [{name: row.get(name, "") for name in COLUMNS} for row in rows])
                bar.end(outcome)
    return where


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row a point: milliseconds a step and tokens a second of both engines, and the ratio of the steps; NaN where
    a run failed."""
    steps = rows.pivot(index=["context", "running"], columns="variant", values=STEP_MS).astype(float)
    made = steps.reset_index()[["context", "running"]]
    for variant in (OURS, PEER):
        made[f"{variant} ms"] = steps[variant].to_numpy()
    made[RATIO] = made[f"{OURS} ms"] / made[f"{PEER} ms"]
    for variant in (OURS, PEER):
        made[f"{variant} {PER_S}"] = 1000 * made["running"] / made[f"{variant} ms"]
    return made


def section(rows: pd.DataFrame, commit: str, command: str, picture: str) -> str:
    """Return the table in Markdown, under the command that made it and what follows from the table, and above the path of
    the picture."""
    made = table(rows)
    ratios = made.dropna(subset=[RATIO]).sort_values(RATIO)
    blocks = [f"**{NAME}.** {ABOUT} Commit {commit[:12]}.", f"```bash\n{command}\n```"]
    if len(ratios):
        least, greatest = (
            f"{number(row[RATIO])} ({row['running']:,.0f} x {row['context']:,.0f} tokens)"
            for row in (ratios.iloc[0], ratios.iloc[-1])
        )
        above = int((ratios[RATIO] > MOST).sum())
        blocks.append(
            f"A step of `{OURS}` takes {least} to {greatest} times as long as one of `{PEER}`; more than {MOST} times at "
            f"{above or 'none'} of {len(ratios)} points."
        )
    made["context"] = made["context"].map("{:,}".format)
    blocks += [f"![Step time and throughput by running requests and context]({picture})", markdown(made)]
    failed = rows[rows["status"] != "finished"]
    blocks += [
        f"Failed: {row['variant']} at {row['running']} x {row['context']:,} tokens ({row['error']})."
        for row in failed.to_dict("records")
    ]
    busy = int((rows["machine_busy"].astype(str) == "True").sum())
    versions = "; ".join(rows["version"].dropna().unique())
    note = f" The machine was busy in {busy} of {len(rows)} runs." if busy else ""
    blocks.append(f"{PEER}: {versions}. Points of more than {MOST_TOKENS:,} tokens in all are left out.{note}")
    return "\n\n".join(blocks)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Draw the step time and the throughput over the running requests, with a colour for each context; points of a failed
    run are left out."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    made = table(rows)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    colours = colours_of(made["context"].astype(str).unique())
    for axes, what, title in zip(
        figure.subplots(1, 2), ("ms", PER_S), ("time of a decode step, ms", "new tokens per second"), strict=True
    ):
        for context, own in made.groupby("context"):
            for variant, (marker, line) in STYLES.items():
                points_of = own.dropna(subset=[f"{variant} {what}"])
                axes.plot(
                    points_of["running"], points_of[f"{variant} {what}"], color=colours[str(context)], marker=marker,
                    linestyle=line, linewidth=1.4, markersize=4.5,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(RUNNING))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
        axes.grid(linewidth=0.4, alpha=0.35)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("running requests")
    handles = [
        Line2D([], [], color=colour, label=f"{int(name):,} tokens of context") for name, colour in colours.items()
    ]
    handles += [
        Line2D([], [], color="black", linestyle=line, marker=marker, label=name)
        for name, (marker, line) in STYLES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=110)
