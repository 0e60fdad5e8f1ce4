"""Recommends a placement of the phases for a workload in four stages.

1. Profile both phases briefly at the sizes of the workload and, on a CPU, with the thread counts of each share.
2. Run a few of the workload's requests in each placement, to measure how concurrent phases slow each other down
   (:mod:`splitwiser.study.calibrate`) and how long answers are that end by themselves.
3. Predict every placement and prefill budget (:mod:`splitwiser.study.simulate`, with step times from
   :mod:`splitwiser.study.step_times`).
4. Run the best predictions, including the best with split phases and the best without, and compare them with what was
   predicted. The measurements decide, unless predictions were too far off or the machine was busy.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from tqdm import tqdm

from splitwiser.engine.policy import find_policy
from splitwiser.engine.schedule import find_schedule
from splitwiser.errors import InputError, RunError
from splitwiser.files import CsvTable, make_directory, write_rows
from splitwiser.llm import make_requests
from splitwiser.machine.device import resolve_device
from splitwiser.model.checkpoints.catalog import decoders_only
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.options import option_fields
from splitwiser.request import Request
from splitwiser.results.goodput import parse_goodput
from splitwiser.results.record import Record
from splitwiser.results.schema import OBJECTIVES, names, throughput_figures
from splitwiser.study.candidates import (
    OUTPUT_TOKENS,
    PLACEMENTS,
    Measurements,
    budgets_of,
    candidates_of,
    measure_placements,
    read_measurements,
    short_profile,
)
from splitwiser.study.config import AdviseConfig
from splitwiser.study.fresh_runs import RoundsBar, run_once
from splitwiser.study.profile import Bench
from splitwiser.study.recommend import (
    ADVICE,
    CHECKS,
    PREDICTED,
    PREDICTIONS,
    Advice,
    choose_checks,
    recommend,
    relative_error,
    rows_of,
    run_options,
)
from splitwiser.study.simulate import Machine, Setup, simulate
from splitwiser.study.step_times import nearest_costs
from splitwiser.workload.job import prepare_job

TABLES = {
    "placements.csv": PLACEMENTS,
    "output_tokens.csv": OUTPUT_TOKENS,
    "predictions.csv": PREDICTIONS,
    "checks.csv": CHECKS,
    "advice.csv": ADVICE,
}


def advise(config: AdviseConfig) -> Advice:
    """Advise on ``config``'s workload and write ``advise_<model>_<UTC time>``; shows progress bars.

    Raises :class:`InputError` before the folder is made if the input is wrong.
    """
    shell = load_model(
        config.model,
        models=config.models,
        dtype=config.dtype,
        device="cpu",
        load_format=config.load_format,
        seed=config.seed,
        weights=False,
    )
    if shell.encodes:
        raise decoders_only(shell.name, "splitwiser advise")
    requests = planned_requests(config, shell)
    measurements = read_measurements(Path(config.profile), shell) if config.profile is not None else None
    bench = Bench(short_profile(config, requests)) if measurements is None else None
    directory = make_directory(Path(config.results), f"advise_{shell.name}")
    device = resolve_device(config.device_name)
    record = Record(directory / "advice.yaml", _sections(config, requests), device)
    with record.running():
        if bench is not None:
            bench.measure(directory)
            bench = None  # frees its model before the next one is loaded
            measure_placements(config, requests, directory)
            measurements = read_measurements(directory, shell)
        assert measurements is not None
        predictions = predict(config, requests, measurements, directory)
        measured = check(config, predictions, directory)
        advice = recommend(config, predictions, measured, directory, measurements.busy)
        write_rows(directory / "advice.csv", names(ADVICE), advice.table.to_dict("records"))
        record.content |= _outcome(advice, measurements)
    return advice


def planned_requests(config: AdviseConfig, shell: LoadedModel) -> list[Request]:
    """Return the workload's requests, as a run makes them. Raises :class:`InputError` for one that no placement can
    serve, and for what no profile measures."""
    for name, own in (("quantization", "none"), ("kv_dtype", "auto")):
        if getattr(config, name) != own:
            raise InputError(f"advise predicts from steps in --dtype; leave --{name} out, and compare it instead")
    job = prepare_job(config, config.seed)
    if config.adapters or any(job.adapters):
        raise InputError("advise predicts the model alone; leave --adapter, and cases that need one, out")
    prompts = job.make_prompts(shell, config.seed)
    return make_requests(
        shell,
        prompts,
        job.sampling_params(config),
        job.arrival_s,
        config.seed,
        priority=job.priority,
        ttft_target_ms=job.ttft_target_ms,
        predicted_tokens=job.predicted_tokens,
    )


def predict(
    config: AdviseConfig, requests: Sequence[Request], measurements: Measurements, directory: Path
) -> pd.DataFrame:
    """Simulate every placement with every prefill budget and schedule; returns the rows of ``predictions.csv``. Raises
    :class:`InputError` if no placement can run the workload or the objective has no value."""
    table = CsvTable(directory / "predictions.csv", names(PREDICTIONS))
    targets = None if config.goodput is None else parse_goodput(config.goodput)
    rng = random.Random(config.seed)
    ends = {
        request.request_id: min(request.max_tokens, rng.choice(measurements.output_tokens))
        for request in requests
        if measurements.output_tokens and not request.params.is_exact
    }
    budgets = budgets_of(config, requests, nearest_costs(measurements.costs, measurements.cores or 0))
    rows: list[dict[str, Any]] = []
    candidates = [
        (placement, candidate)
        for placement in measurements.placements
        for candidate in candidates_of(placement.mode, placement.workers, budgets)
    ]
    for placement, candidate in tqdm(candidates, desc="predictions", unit="run"):
        setup = Setup(
            candidate.layout,
            candidate.prefill_tokens,
            config.max_batch,
            config.lend,
            find_policy(config.policy),
            find_schedule(candidate.schedule or config.schedule),
            reserve=config.reserve,
            prefix_caching=bool(config.prefix_caching),
        )
        row = candidate.row
        try:
            machine = Machine(measurements.costs, measurements.cores, placement.blocks)
            outputs = simulate(
                requests, machine, setup, placement.conditions, ends, max_concurrency=config.max_concurrency
            )
            figures = throughput_figures(outputs, 0, 0, targets)
            row |= {name: figures[name] for name in names(PREDICTED)}
        except InputError as error:
            row["not_possible"] = str(error)
        rows.append(row)
        table.write(row)
    if all("not_possible" in row for row in rows):
        raise InputError(str(rows[0]["not_possible"]))
    objective = OBJECTIVES[config.objective].name
    if all(row.get(objective) is None for row in rows):
        raise InputError(f"--objective {config.objective}: answers of one token have no such metric; choose another")
    for each in measurements.impossible:
        rows.append({"mode": each.mode, "workers": each.workers, "not_possible": each.reason})
        table.write(rows[-1])
    return pd.DataFrame(rows, columns=list(names(PREDICTIONS)))


def check(config: AdviseConfig, predictions: pd.DataFrame, directory: Path) -> pd.DataFrame:
    """Run the chosen candidates in fresh processes, in interleaved rounds; returns the rows of ``checks.csv``. Raises
    :class:`RunError` if every run failed."""
    chosen = choose_checks(config, predictions)
    table = CsvTable(directory / "checks.csv", names(CHECKS))
    rows: list[dict[str, Any]] = []
    with RoundsBar(len(chosen) * config.repeats) as bar:
        for number in range(config.repeats):
            for place, candidate in enumerate(chosen, start=1):
                bar.begin(f"check of {candidate}")
                outcome = run_once(run_options(config, candidate), directory, f"round{number}-{place}", bar.show)
                bar.end(outcome)
                predicted = predictions.loc[rows_of(predictions, candidate)].iloc[0]
                for name in names(PREDICTED) if outcome.status == "finished" else ():
                    if outcome.figures[name]:
                        measured = float(outcome.figures[name])
                        row = {
                            **candidate.row,
                            "round": number,
                            "figure": name,
                            "predicted": predicted[name],
                            "measured": measured,
                            "error": relative_error(predicted[name], measured),
                            "run_id": outcome.figures["run_id"],
                            "machine_busy": outcome.figures["machine_busy"],
                        }
                        rows.append(row)
                        table.write(row)
    if chosen and not rows:
        raise RunError("every check failed, so nothing is recommended; see above and the folder logs/")
    return pd.DataFrame(rows, columns=list(names(CHECKS)))


def _sections(config: AdviseConfig, requests: Sequence[Request]) -> dict[str, Any]:
    lengths = [len(request.prompt_token_ids) for request in requests]
    return {
        "configuration": {name: getattr(config, name) for name in option_fields(AdviseConfig)},
        "requests": {
            "count": len(requests),
            "prompt_tokens": {"least": min(lengths), "median": median(lengths), "greatest": max(lengths)},
            "last_arrival_s": max(request.arrival_s for request in requests),
        },
    }


def _outcome(advice: Advice, measurements: Measurements) -> dict[str, Any]:
    return {
        "split": advice.split,
        "recommended": advice.best and advice.best.row,
        "command": advice.command,
        "reasons": advice.reasons,
        "median_errors": advice.errors,
        "answers_end": "as a sample of them did" if measurements.output_tokens else "at their greatest length",
        "step_costs": {
            threads: {
                "prefill": list(costs.prefill_coefficients),
                "decode": [list(line) for line in costs.decode_lines],
            }
            for threads, costs in measurements.costs.items()
        },
    }
