"""Chooses the recommendation from predictions and measurements, and explains it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from splitwiser import constants
from splitwiser.config import RunConfig
from splitwiser.engine.schedule import measures_budget
from splitwiser.options import option_fields, to_arguments
from splitwiser.placement.layout import parse_layout
from splitwiser.results.schema import METRIC, OBJECTIVES, Column, names, shown_in
from splitwiser.results.terminal import columns
from splitwiser.study.candidates import CANDIDATE, Candidate
from splitwiser.study.config import AdviseConfig

PREDICTED = [metric for metric in shown_in("report") if metric.compute is not None]
"""The report's headline metrics that follow from the outputs alone, so that a simulation has them."""
PREDICTIONS = (
    *CANDIDATE,
    *PREDICTED,
    Column("not_possible", "Why this machine cannot run the candidate; empty if it can."),
)
CHECKS = (
    *CANDIDATE,
    Column("round", "Number of the round, from 0."),
    Column("figure", "Column of throughput.csv."),
    Column("predicted", "What was predicted.", "that of the figure"),
    Column("measured", "What was measured.", "that of the figure"),
    Column("error", "(predicted - measured) / measured."),
    Column("run_id", "Name of the run's folder."),
    METRIC["machine_busy"],
)
ADVICE = (
    *PREDICTIONS,
    *(
        each
        for metric in PREDICTED
        for each in (
            Column(f"measured_{metric.name}", f"Measured median: {metric.description}", metric.unit),
            Column(f"error_{metric.name}", "(predicted - measured) / measured."),
        )
    ),
)
AIM = 0.2  # largest relative error of a prediction; beyond it nothing is recommended
# least gain for which splitting is recommended: it needs more processes and trades one latency for another
WORTH = 0.05


@dataclass
class Advice:
    """The recommendation and its reasons; ``table`` has a row per candidate with predictions and measurements. If nothing
    can be recommended, ``best``, ``split`` and ``command`` are None and ``reasons`` say why and what to do."""

    directory: Path
    table: pd.DataFrame
    best: Candidate | None
    split: bool | None
    command: str | None
    reasons: list[str]
    errors: dict[str, float] = field(default_factory=dict)


def choose_checks(config: AdviseConfig, predictions: pd.DataFrame) -> list[Candidate]:
    """Return the candidates to run: the best with split phases and the best without, so that the two can be compared, then
    the next best."""
    ranked = _ranked(predictions, config.objective)
    first = [next((each for each in ranked if each.splits is splits), None) for splits in (True, False)]
    wanted = sorted([each for each in first if each], key=ranked.index)
    return [*wanted, *(each for each in ranked if each not in wanted)][: config.checks]


def recommend(
    config: AdviseConfig, predictions: pd.DataFrame, checks: pd.DataFrame, directory: Path, busy: Sequence[str] = ()
) -> Advice:
    """Return the best candidate by measurement, or by prediction if nothing was run, with the reasons.

    Split phases are recommended only if they gain more than :data:`WORTH`. Nothing is recommended if predictions of the
    objective were off by more than :data:`AIM`, or if the machine was busy during a check or during the measurements that
    predictions are based on, which ``busy`` names.
    """
    table = join_measured(predictions, checks)
    objective = OBJECTIVES[config.objective]
    figure, name, unit = objective.name, objective.label, objective.unit
    basis, prefix = ("predicted", "") if checks.empty else ("measured", "measured_")
    ranked = _ranked(table, config.objective, f"{prefix}{figure}")
    split = next((each for each in ranked if each.splits), None)
    whole = next((each for each in ranked if not each.splits), None)

    def value(candidate: Candidate, of: str) -> float:
        return float(table.loc[rows_of(table, candidate), f"{prefix}{of}"].iloc[0])

    why: list[str] = []
    if split is None or whole is None:
        best = ranked[0]
        kind = "one worker for both phases" if split is None else "split phases"
        found = f"Only {kind} could be {basis}: {name} is {value(best, figure):,.1f} {unit}"
        gained = ""
    else:
        ratio = value(split, figure) / value(whole, figure)
        gain = ratio - 1 if objective.more_is_better else 1 / ratio - 1
        best = split if gain > WORTH else whole
        better = "better" if gain > 0 else "worse"
        kept = ", too little to be worth it" if 0 < gain <= WORTH else ""
        changes = [
            f"{each.label} {value(whole, each.name):,.1f} to {value(split, each.name):,.1f} {each.unit}"
            for each in shown_in("advise")
            if each.objective and each is not objective
            # answers of one token have no ITL
            if pd.notna(value(whole, each.name)) and pd.notna(value(split, each.name))
        ]
        found = (
            f"{objective.title} is {value(split, figure):,.1f} {unit} with split phases and "
            f"{value(whole, figure):,.1f} {unit} without ({basis})"
        )
        gained = f": splitting makes it {abs(gain):.0%} {better}{kept}"
        why.append(f"From one worker to split phases, {' and '.join(changes)}.")
    errors = median_errors(checks)
    doubts: list[str] = []
    if figure in errors:
        said, is_met = _accuracy(table, figure, name, checks, [each for each in (split, whole) if each])
        (why if is_met else doubts).append(said)
    during = [*busy, *_busy_checks(checks)]
    if during:
        doubts.append(
            f"The machine was busy during {', '.join(during)}: the measurements are disturbed. Run this again while "
            f"nothing else runs{' (without --profile)' if config.profile is not None and busy else ''}."
        )
    if doubts:
        return Advice(directory, table, None, None, None, [f"{found}.", *doubts], errors)
    command = shlex.join(["splitwiser", "run", *to_arguments(run_options(config, best))])
    return Advice(directory, table, best, best.splits, command, [f"{found}{gained}.", *why], errors)


def _accuracy(
    table: pd.DataFrame, figure: str, name: str, checks: pd.DataFrame, compared: Sequence[Candidate]
) -> tuple[str, bool]:
    """Describe how well ``figure`` was predicted for the checks, and return whether that is within :data:`AIM`, over all
    runs and for each of the ``compared`` candidates."""
    off = median_errors(checks)[figure]
    said = f"Predictions of {name} were off by {off:.0%} (median of {checks['run_id'].nunique()} runs)"
    own = {each: abs(float(table.loc[rows_of(table, each), f"error_{figure}"].iloc[0])) for each in compared}
    missed = {each: error for each, error in own.items() if error > AIM}
    if off <= AIM and not missed:
        return f"{said}, within the aim of {AIM:.0%}.", True
    if off <= AIM:
        said += "".join(f", but by {error:.0%} for {each}" for each, error in missed.items())
    again = "run this again with --repeats 3 while the machine does nothing else, or let splitwiser compare measure"
    return f"{said}, outside the aim of {AIM:.0%}, so nothing is recommended; {again}.", False


def _busy_checks(checks: pd.DataFrame) -> list[str]:
    if "machine_busy" not in checks:
        return []
    runs = checks[checks["machine_busy"].astype(str) == "True"].drop_duplicates("run_id")
    return [f"the check of {Candidate.of(row)} in round {int(row['round']) + 1}" for row in runs.to_dict("records")]


def median_errors(checks: pd.DataFrame) -> dict[str, float]:
    """Return the median absolute relative error of each figure over all runs."""
    known = checks.dropna(subset="error")
    return {str(figure): float(median(map(abs, rows["error"]))) for figure, rows in known.groupby("figure")}


def join_measured(predictions: pd.DataFrame, checks: pd.DataFrame) -> pd.DataFrame:
    """Return ``predictions`` with the measured median and the prediction's error of each figure added."""
    table = predictions.copy()
    for name in names(PREDICTED):
        table[f"measured_{name}"] = float("nan")
        table[f"error_{name}"] = float("nan")
    for key, rows in checks.groupby([*names(CANDIDATE), "figure"]):
        *candidate, name = map(str, key)
        place = rows_of(table, Candidate.of(dict(zip(names(CANDIDATE), candidate, strict=True))))
        measured = float(rows["measured"].median())
        table.loc[place, f"measured_{name}"] = measured
        table.loc[place, f"error_{name}"] = relative_error(float(table.loc[place, name].iloc[0]), measured)
    return table


def relative_error(predicted: float | None, measured: float | None) -> float | None:
    """Return (predicted - measured) / measured; None if either is missing."""
    if not measured or predicted is None or pd.isna(predicted) or pd.isna(measured):
        return None
    return (predicted - measured) / measured


def run_options(config: AdviseConfig, candidate: Candidate) -> dict[str, Any]:
    """Return the options of ``splitwiser run`` for ``candidate`` on the workload of ``config``, without those at their
    defaults."""
    changed = {name: value for name, value in candidate.row.items() if value != ""}
    if candidate.prefill_tokens == config.step_tokens and not measures_budget(candidate.schedule):
        changed["prefill_tokens"] = config.prefill_tokens
    if candidate.mode != "mp":  # the only one that has a second lane, which predictions are without
        changed["second_lane"] = constants.SECOND_LANE
    options = option_fields(RunConfig)
    values = {name: changed.get(name, getattr(config, name)) for name in options}
    return {name: value for name, value in values.items() if name == "mode" or value != options[name].default}


def advice_summary(advice: Advice) -> str:
    """Return the table for the terminal, the recommendation and its reasons."""
    heading = ["mode", "workers", "schedule", "prefill"]
    for metric in shown_in("advise"):
        heading += [metric.heading, "run", "error"]
    rows, missing = [heading], []
    for row in advice.table.to_dict("records"):
        workers = str(parse_layout(row["workers"])) if row["workers"] else ""
        if pd.notna(row["not_possible"]):
            missing.append(
                " ".join(filter(None, [row["mode"], workers])) + f" is not possible here: {row['not_possible']}"
            )
            continue
        cells = [row["mode"], workers, row["schedule"], f"{row['prefill_tokens']:.0f}"]
        for name in names(shown_in("advise")):
            cells += [_cell(row[name]), _cell(row[f"measured_{name}"]), _cell(row[f"error_{name}"], "+.0%")]
        rows.append(cells)
    verdict = {True: "split the phases", False: "do not split the phases", None: "none"}[advice.split]
    lines = [columns(rows), *missing, "", f"Advice: {verdict}. {' '.join(advice.reasons)}"]
    lines += [f"    {advice.command}"] if advice.command else []
    return "\n".join([*lines, f"results  {advice.directory}"])


def _cell(value: float | None, form: str = ",.1f") -> str:
    return "" if value is None or pd.isna(value) else format(value, form)


def _ranked(table: pd.DataFrame, objective: str, column: str | None = None) -> list[Candidate]:
    """Return the candidates that have the figure, best first; ties keep the order of the table."""
    metric = OBJECTIVES[objective]
    by = column or metric.name
    rows = table[table[by].notna()].sort_values(by, ascending=not metric.more_is_better, kind="stable")
    return [Candidate.of(row) for row in rows.to_dict("records")]


def rows_of(table: pd.DataFrame, candidate: Candidate) -> "pd.Series[bool]":
    """Return a mask of the rows of ``table`` that belong to ``candidate``."""
    return (
        (table["mode"] == candidate.mode)
        & (table["workers"] == candidate.workers)
        & (table["prefill_tokens"] == candidate.prefill_tokens)
        & (table["schedule"] == candidate.schedule)
    )
