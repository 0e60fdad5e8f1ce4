"""Advises how to place the phases for a workload: measures a little, predicts every placement, runs the best, recommends.

1. A short profile of both phases at the sizes of the workload and, on a CPU, with the cores of each share.
2. A few of the workload's requests in each placement, to learn what running side by side does to a step
   (:mod:`splitwiser.calibrate`) and, where requests end by themselves, how long answers are.
3. Every placement and prefill budget is predicted (:mod:`splitwiser.simulate`, over :mod:`splitwiser.costs`).
4. The best predictions, the best with split phases and the best without among them, are run and held against what was
   predicted; what was measured decides.
"""

import dataclasses
import gc
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
import yaml
from tqdm import tqdm

from splitwiser.calibrate import Recording, conditions_of, size_steps
from splitwiser.config import AdviseConfig, ProfileConfig, RunConfig, option_fields
from splitwiser.cores import plan_threads
from splitwiser.costs import StepCosts, fit_costs
from splitwiser.engine import check_fits
from splitwiser.errors import InputError, RunError
from splitwiser.layout import ONE_MIXED, WorkerLayout, parse_layout
from splitwiser.llm import DEFAULT_LAYOUTS, LLM
from splitwiser.machine import describe_machine, describe_versions, git_commit
from splitwiser.metrics import throughput_figures
from splitwiser.model import LoadedModel, load_model, resolve_device
from splitwiser.profile import Bench, append_row, start_csv
from splitwiser.request import Request, SamplingParams
from splitwiser.results import Status, make_directory, replace
from splitwiser.run import prepare_job
from splitwiser.simulate import Conditions, Machine, Schedule, simulate
from splitwiser.summary import columns

FIGURES = (
    "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "median_e2el_ms", "p99_e2el_ms",
)  # fmt: skip
CANDIDATE_COLUMNS = ("mode", "workers", "prefill_tokens")
PREDICTION_COLUMNS = (*CANDIDATE_COLUMNS, *FIGURES, "not_possible")
CHECK_COLUMNS = (*CANDIDATE_COLUMNS, "round", "figure", "predicted", "measured", "error", "run_id")
PLACEMENT_COLUMNS = (
    "mode", "workers", "blocks", *(each.name for each in fields(Conditions)), "steps", "not_possible",
)  # fmt: skip

OBJECTIVE_FIGURES = {  # figure of throughput.csv, whether more is better, its name in a sentence, its unit
    "throughput": ("output_throughput", True, "throughput", "tokens/s"),
    "ttft": ("p99_ttft_ms", False, "TTFT p99", "ms"),
    "itl": ("p99_itl_ms", False, "ITL p99", "ms"),
    "e2el": ("p99_e2el_ms", False, "E2E p99", "ms"),
}
AIM = 0.2  # a prediction is good within this part of what was measured
WORTH = (
    0.05  # splitting must gain this much to be recommended: it takes more processes, and trades one latency for another
)

# options that a profile and a run have in common
_SHARED_OPTIONS = ("dtype", "device", "gpu_id", "load_format", "kv_memory", "kernels", "seed")
_SHARES = (25, 50, 75)  # of prefill; decode gets the rest
_BUDGETS = (256, 512, 1024)  # prefill tokens a step that are predicted beside the one asked for
_SAMPLE = 16  # requests of a calibrating run
_SAMPLE_TOKENS = 64  # most new tokens of each, where all that is learnt from more is the same again
_GPU_MODES = ("mps", "green")
_STOP_S = 30.0  # longest that a check may take to end after Ctrl-C


@dataclass(frozen=True)
class Candidate:
    """A way to run the workload."""

    mode: str
    workers: str
    prefill_tokens: int

    @property
    def layout(self) -> WorkerLayout:
        """Its workers."""
        return parse_layout(self.workers) if self.workers else DEFAULT_LAYOUTS.get(self.mode, ONE_MIXED)

    @property
    def splits(self) -> bool:
        """Whether prefill and decode have workers of their own."""
        return any(spec.role == "prefill" for spec in self.layout.workers)

    @property
    def row(self) -> dict[str, Any]:
        """Its columns."""
        return asdict(self)

    def __str__(self) -> str:
        workers = f" with {self.workers}" if self.workers else ""
        return f"{self.mode}{workers}, {self.prefill_tokens} prefill tokens a step"


@dataclass(frozen=True)
class Basis:
    """What predictions rest on, as :func:`measure` writes it and :func:`read_basis` reads it.

    ``placements`` holds (mode, workers): the conditions there and the blocks of the pool; ``not_possible`` those that this
    machine cannot run, with the reason; ``output_tokens`` the lengths of a sample of answers that ended by themselves.
    """

    costs: Mapping[int, StepCosts]
    cores: int | None
    placements: Mapping[tuple[str, str], tuple[Conditions, int]]
    not_possible: Mapping[tuple[str, str], str]
    output_tokens: Sequence[int]


@dataclass
class Advice:
    """What is recommended and why; ``table`` has a row a candidate with what was predicted and measured."""

    directory: Path
    table: pd.DataFrame
    best: Candidate
    split: bool
    command: str
    reasons: list[str]
    errors: dict[str, float] = field(default_factory=dict)


def advise(config: AdviseConfig) -> Advice:
    """Advise on ``config``'s workload and write ``advise_<model>_<UTC time>``; shows progress bars.

    Raises :class:`InputError` before the folder is made if the input is wrong.
    """
    shell = load_model(
        config.model, dtype=config.dtype, device="cpu", load_format=config.load_format, seed=config.seed, weights=False
    )
    requests = make_requests(config, shell)
    basis = read_basis(Path(config.profile), shell) if config.profile is not None else None
    bench = Bench(short_profile(config, requests)) if basis is None else None
    directory = make_directory(Path(config.results), f"advise_{shell.name}")
    record = _Record(directory, config, requests)
    status: Status = "failed"
    record.write("running")
    try:
        if bench is not None:
            bench.measure(directory)
            del bench
            measure_placements(config, requests, directory)
            basis = read_basis(directory, shell)
        assert basis is not None
        predictions = predict(config, requests, basis, directory)
        measured = check(config, predictions, directory)
        advice = recommend(config, predictions, measured, directory)
        advice.table.to_csv(directory / "advice.csv", index=False)
        record.add(advice, basis)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        record.write(status)
        if status != "finished":
            print(f"{status}; what was found so far is in {directory}", file=sys.stderr)
    return advice


def make_requests(config: AdviseConfig, shell: LoadedModel) -> list[Request]:
    """The workload's requests, as a run makes them. Raises :class:`InputError` for one that no placement can serve."""
    job = prepare_job(config)
    params = config.sampling_params(job.max_new_tokens)
    requests = []
    for number, (prompt, arrival_s) in enumerate(zip(job.prompts, job.arrival_s, strict=True)):
        if isinstance(prompt, str):
            if shell.tokenizer is None:
                raise InputError(f"request {number}: {shell.name} has no tokenizer; give its prompt as token ids")
            prompt = shell.tokenizer(prompt).input_ids
        requests.append(Request(number, tuple(prompt), params, seed=number, arrival_s=arrival_s))
        check_fits(requests[-1], shell, None)
    return requests


def short_profile(config: AdviseConfig, requests: Sequence[Request]) -> ProfileConfig:
    """The profile that predictions of ``requests`` need: prompts and batches of their sizes, threads of every share."""
    lengths = sorted(len(request.prompt_token_ids) for request in requests)
    longest = max(request.most_tokens for request in requests)
    batch = min(config.max_batch, len(requests))
    threads = set()
    if resolve_device(config.device_name).type == "cpu":
        cores = describe_machine(torch.device("cpu"))["cores"]
        for _, workers in placements("cpu", cores):
            layout = parse_layout(workers) if workers else DEFAULT_LAYOUTS["mp"]
            threads |= {cores, *plan_threads(layout.workers, cores)}

    def text(numbers: set[int]) -> str:
        return ",".join(map(str, sorted(numbers)))

    return ProfileConfig(
        model=config.model,
        prompt_lengths=text({max(1, lengths[0] // 2), lengths[0], lengths[len(lengths) // 2], lengths[-1]}),
        prompts="4,16",
        starts=str(min(_BUDGETS)),
        batch_sizes=text({1, batch} | {size for size in (4, 16) if size < batch}),
        contexts=text({max(2, lengths[0] + 1), max(2, longest)}),
        threads=text(threads),
        repeats=3,
        prefill_tokens=config.prefill_tokens,
        **{name: getattr(config, name) for name in _SHARED_OPTIONS},
    )


def placements(device: str, cores: int) -> list[tuple[str, str]]:
    """The (mode, workers) to predict on ``device`` (cpu or cuda), as options of a run.

    On a CPU, shares that come to the same threads are one, and those that take more threads than there are ``cores`` are
    left out; on a GPU, mode ``mp`` has no shares.
    """
    found = [("sequential", ""), ("mp", "")]
    shared = [(f"[{{role: prefill, share: {share}}}, {{role: decode, share: {100 - share}}}]") for share in _SHARES]
    if device != "cpu":
        return found + [(mode, workers) for mode in _GPU_MODES for workers in shared]
    seen = [plan_threads(DEFAULT_LAYOUTS["mp"].workers, cores)]
    for workers in shared:
        threads = plan_threads(parse_layout(workers).workers, cores)
        if threads not in seen and sum(threads) <= cores:
            seen.append(threads)
            found.append(("mp", workers))
    return found


def measure_placements(config: AdviseConfig, requests: Sequence[Request], directory: Path) -> None:
    """Run a sample of ``requests`` in each placement and write ``placements.csv`` and ``output_tokens.csv``."""
    device = resolve_device(config.device_name)
    cores = describe_machine(device)["cores"]
    costs = fit_costs(pd.read_csv(directory / "prefill.csv"), pd.read_csv(directory / "decode.csv"))
    start_csv(directory / "placements.csv", PLACEMENT_COLUMNS)
    sample = requests[:: -(-len(requests) // _SAMPLE)]
    if device.type == "cpu":
        for mode in _GPU_MODES:
            row = {"mode": mode, "workers": "", "not_possible": "needs an NVIDIA GPU; the device is a CPU"}
            append_row(directory / "placements.csv", row)
    listed = placements(device.type, cores)
    with tqdm(listed, desc="side by side", unit="placement") as bar:
        for mode, workers in bar:
            bar.set_postfix_str(f"{mode} {workers}")
            row = {"mode": mode, "workers": workers}
            try:
                recording, blocks = _run_sample(config, mode, workers, sample)
            except InputError as error:
                if mode == "sequential":
                    raise
                append_row(directory / "placements.csv", row | {"not_possible": str(error)})
                continue
            layout = Candidate(mode, workers, config.prefill_tokens).layout
            steps = size_steps(recording)
            conditions = conditions_of(steps, costs, layout, cores if device.type == "cpu" else None, config.lend_cores)
            append_row(directory / "placements.csv", row | asdict(conditions) | {"blocks": blocks, "steps": len(steps)})
            if mode == "sequential" and not config.ignore_eos:
                lengths = pd.DataFrame({"output_tokens": [len(output.token_ids) for output in recording.outputs]})
                lengths.to_csv(directory / "output_tokens.csv", index=False)


def _run_sample(config: AdviseConfig, mode: str, workers: str, sample: Sequence[Request]) -> tuple[Recording, int]:
    """Run ``sample``, all at once; with the blocks of the pool."""
    total = sum(len(request.prompt_token_ids) for request in sample)
    with LLM(
        config.model,
        mode=mode,
        workers=workers,
        # several prefill steps, so that most of them run beside decode steps
        prefill_tokens=min(config.prefill_tokens, max(64, total // 8)),
        device=config.device_name,
        **{name: getattr(config, name) for name in _SHARED_OPTIONS if name not in ("device", "gpu_id")},
        lend_cores=config.lend_cores,
        max_batch=config.max_batch,
    ) as llm:
        prompts, params = zip(*((each.prompt_token_ids, _sample_params(each.params)) for each in sample), strict=True)
        recording = Recording()
        llm.run(llm.make_requests(prompts, params), recording, time.perf_counter_ns())
        assert llm.pool is not None
        blocks = llm.pool.blocks
    del llm
    gc.collect()  # before the next model comes
    return recording, blocks


def _sample_params(params: SamplingParams) -> SamplingParams:
    return (
        dataclasses.replace(params, max_tokens=min(params.max_tokens, _SAMPLE_TOKENS)) if params.ignore_eos else params
    )


def read_basis(directory: Path, shell: LoadedModel) -> Basis:
    """What :func:`measure_placements` and the profile before it wrote into ``directory``, for the model ``shell``.

    Raises :class:`InputError` for a folder that lacks something or is of another model.
    """
    where = f"--profile {directory}"
    for name in ("prefill.csv", "decode.csv", "placements.csv"):
        if not (directory / name).is_file():
            raise InputError(f"{where}: no {name} in it; give the folder that an advise has made")
    record = yaml.safe_load((directory / "profile.yaml").read_text(encoding="utf-8"))
    model = record["model"]
    dtype = str(shell.dtype).removeprefix("torch.")
    if (model["name"], model["dtype"]) != (shell.name, dtype):
        raise InputError(f"{where}: is of {model['name']} in {model['dtype']}, not of {shell.name} in {dtype}")
    rows = pd.read_csv(directory / "placements.csv", keep_default_na=False)
    conditions = {}
    not_possible = {}
    for row in rows.to_dict("records"):
        key = str(row["mode"]), str(row["workers"])
        if row["not_possible"]:
            not_possible[key] = str(row["not_possible"])
        else:
            factors = Conditions(**{each.name: float(row[each.name]) for each in fields(Conditions)})
            conditions[key] = factors, int(float(row["blocks"]))
    if not conditions:
        raise InputError(f"{where}: its placements.csv has no placement; give the folder of an advise that finished")
    lengths = directory / "output_tokens.csv"
    return Basis(
        costs=fit_costs(pd.read_csv(directory / "prefill.csv"), pd.read_csv(directory / "decode.csv")),
        cores=record["machine"]["cores"] if record["configuration"]["device"] == "cpu" else None,
        placements=conditions,
        not_possible=not_possible,
        output_tokens=pd.read_csv(lengths)["output_tokens"].tolist() if lengths.exists() else [],
    )


def predict(config: AdviseConfig, requests: Sequence[Request], basis: Basis, directory: Path) -> pd.DataFrame:
    """Simulate every placement with every prefill budget; the rows of ``predictions.csv``."""
    start_csv(directory / "predictions.csv", PREDICTION_COLUMNS)
    rng = random.Random(config.seed)
    ends = {
        request.request_id: min(request.params.max_tokens, rng.choice(basis.output_tokens))
        for request in requests
        if basis.output_tokens and not request.params.ignore_eos
    }
    tokens = sum(len(request.prompt_token_ids) for request in requests)
    budgets = sorted({config.prefill_tokens} | {each for each in _BUDGETS if each < min(tokens, config.prefill_tokens)})
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(basis.placements) * len(budgets), desc="predictions", unit="run") as bar:
        for (mode, workers), (conditions, blocks) in basis.placements.items():
            for budget in budgets:
                candidate = Candidate(mode, workers, budget)
                schedule = Schedule(candidate.layout, budget, config.max_batch, config.lend_cores)
                row = candidate.row
                try:
                    outputs = simulate(requests, Machine(basis.costs, basis.cores, blocks), schedule, conditions, ends)
                    figures = throughput_figures(outputs, 0, 0)
                    row |= {name: figures[name] for name in FIGURES}
                except InputError as error:
                    row["not_possible"] = str(error)
                rows.append(row)
                append_row(directory / "predictions.csv", row)
                bar.update()
    for (mode, workers), reason in basis.not_possible.items():
        rows.append({"mode": mode, "workers": workers, "not_possible": reason})
        append_row(directory / "predictions.csv", rows[-1])
    return pd.DataFrame(rows, columns=list(PREDICTION_COLUMNS))


def choose_checks(config: AdviseConfig, predictions: pd.DataFrame) -> list[Candidate]:
    """What to run: the best with split phases and the best without, so that the two can be held against each other, then
    the next best."""
    ranked = _ranked(predictions, config.objective)
    first = [next((each for each in ranked if each.splits is splits), None) for splits in (True, False)]
    wanted = sorted([each for each in first if each], key=ranked.index)
    return [*wanted, *(each for each in ranked if each not in wanted)][: config.checks]


def check(config: AdviseConfig, predictions: pd.DataFrame, directory: Path) -> pd.DataFrame:
    """Run the chosen candidates in fresh processes, in interleaved rounds; the rows of ``checks.csv``."""
    chosen = choose_checks(config, predictions)
    start_csv(directory / "checks.csv", CHECK_COLUMNS)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(chosen) * config.repeats, desc="checks", unit="run") as bar:
        for number in range(config.repeats):
            for candidate in chosen:
                bar.set_postfix_str(str(candidate))
                figures = _run(run_arguments(config, candidate), directory / "runs")
                predicted = predictions.loc[_rows_of(predictions, candidate)].iloc[0]
                for name in FIGURES:
                    row = {
                        **candidate.row,
                        "round": number,
                        "figure": name,
                        "predicted": predicted[name],
                        "measured": figures[name],
                        "error": relative_error(predicted[name], figures[name]),
                        "run_id": figures["run_id"],
                    }
                    rows.append(row)
                    append_row(directory / "checks.csv", row)
                bar.update()
    return pd.DataFrame(rows, columns=list(CHECK_COLUMNS))


def recommend(config: AdviseConfig, predictions: pd.DataFrame, checks: pd.DataFrame, directory: Path) -> Advice:
    """The best candidate by what was measured, or by prediction where nothing was run, and why.

    Split phases are recommended only where they gain more than :data:`WORTH`.
    """
    table = join_measured(predictions, checks)
    measured = not checks.empty
    figure, more_is_better, name, unit = OBJECTIVE_FIGURES[config.objective]
    column = f"measured_{figure}" if measured else figure
    ranked = _ranked(table, config.objective, column)
    best_split = next((each for each in ranked if each.splits), None)
    best_whole = next((each for each in ranked if not each.splits), None)

    def value(candidate: Candidate, of: str) -> float:
        source = f"measured_{of}" if measured else of
        return float(table.loc[_rows_of(table, candidate), source].iloc[0])

    basis = "measured" if measured else "predicted"
    if best_split is None or best_whole is None:
        split = best_whole is None
        best = ranked[0]
        kind = "split phases" if split else "phases in one worker"
        reasons = [f"Only {kind} could be {basis}: {name} {value(best, figure):,.1f} {unit}."]
    else:
        ratio = value(best_split, figure) / value(best_whole, figure)
        gain = ratio - 1 if more_is_better else 1 / ratio - 1
        split = gain > WORTH
        best = best_split if split else best_whole
        reasons = [
            f"{name} is {value(best_split, figure):,.1f} {unit} with split phases and {value(best_whole, figure):,.1f} "
            f"{unit} without ({basis}): splitting makes it {abs(gain):.0%} {'better' if gain > 0 else 'worse'}"
            + (", which is too little to be worth it." if 0 < gain <= WORTH else "."),
            "It changes "
            + ", ".join(
                f"{label} from {value(best_whole, key):,.1f} to {value(best_split, key):,.1f} {of}"
                for key, _, label, of in OBJECTIVE_FIGURES.values()
                if key != figure and key != "p99_e2el_ms"
            )
            + ".",
        ]
    errors = {
        str(key): float(median(abs(each) for each in rows["error"].dropna()))
        for key, rows in checks.groupby("figure")
        if rows["error"].notna().any()
    }
    if figure in errors:
        good = "within" if errors[figure] <= AIM else "outside"
        reasons.append(
            f"The prediction of {name} was off by {errors[figure]:.0%} (median of the runs), {good} the aim of {AIM:.0%}."
        )
    command = shlex.join(["splitwiser", "run", *run_arguments(config, best)])
    return Advice(directory, table, best, split, command, reasons, errors)


def join_measured(predictions: pd.DataFrame, checks: pd.DataFrame) -> pd.DataFrame:
    """``predictions`` with, for each figure, the median of what was measured and the prediction's error."""
    table = predictions.copy()
    for name in FIGURES:
        table[f"measured_{name}"] = float("nan")
        table[f"error_{name}"] = float("nan")
    for key, rows in checks.groupby([*CANDIDATE_COLUMNS, "figure"]):
        mode, workers, budget, name = map(str, key)
        place = _rows_of(table, Candidate(mode, workers, int(budget)))
        measured = float(rows["measured"].median())
        table.loc[place, f"measured_{name}"] = measured
        table.loc[place, f"error_{name}"] = relative_error(float(table.loc[place, name].iloc[0]), measured)
    return table


def relative_error(predicted: float | None, measured: float | None) -> float | None:
    """(predicted - measured) / measured; None where there is nothing to compare."""
    if not measured or predicted is None or pd.isna(predicted) or pd.isna(measured):
        return None
    return (predicted - measured) / measured


def run_arguments(config: AdviseConfig, candidate: Candidate) -> list[str]:
    """The arguments of ``splitwiser run`` that run ``candidate`` over ``config``'s workload: what differs from defaults."""
    changed = {"mode": candidate.mode, "workers": candidate.workers, "prefill_tokens": candidate.prefill_tokens}
    arguments = []
    for option in option_fields(RunConfig):
        value = changed.get(option.name, getattr(config, option.name))
        if option.name == "mode" or value != option.default:
            if option.metadata["type"] is bool:
                arguments.append(f"--{option.name}" if value else f"--no-{option.name}")
            else:
                arguments += [f"--{option.name}", str(value)]
    return arguments


def advice_summary(advice: Advice) -> str:
    """The table that the terminal shows, the recommendation and its reasons."""
    shown = ("output_throughput", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")
    heading = ["mode", "workers", "prefill"]
    for name in ("tokens/s", "TTFT p99 ms", "ITL p50 ms", "ITL p99 ms"):
        heading += [name, "run", "error"]
    rows = [heading]
    for row in advice.table.to_dict("records"):
        if row["not_possible"] and not pd.isna(row["not_possible"]):
            rows.append([row["mode"], row["workers"], f"not possible here: {row['not_possible']}", *[""] * 12])
            continue
        cells = [row["mode"], _short(row["workers"]), f"{row['prefill_tokens']:.0f}"]
        for name in shown:
            cells += [_cell(row[name]), _cell(row[f"measured_{name}"]), _cell(row[f"error_{name}"], "+.0%")]
        rows.append(cells)
    verdict = "split the phases" if advice.split else "do not split the phases"
    return "\n".join(
        [columns(rows), "", f"Advice: {verdict}. {' '.join(advice.reasons)}", f"    {advice.command}",
         f"results  {advice.directory}"]
    )  # fmt: skip


def _cell(value: float | None, form: str = ",.1f") -> str:
    return "" if value is None or pd.isna(value) else format(value, form)


def _short(workers: str) -> str:
    """A layout in the words of a table."""
    return str(parse_layout(workers)) if workers else ""


def _ranked(table: pd.DataFrame, objective: str, column: str | None = None) -> list[Candidate]:
    """The candidates that have the figure, the best first; of equals, those listed first."""
    figure, more_is_better, _, _ = OBJECTIVE_FIGURES[objective]
    rows = table[table[column or figure].notna()]
    rows = rows.sort_values(column or figure, ascending=not more_is_better, kind="stable")
    return [
        Candidate(str(mode), str(workers), int(budget))
        for mode, workers, budget in rows[list(CANDIDATE_COLUMNS)].itertuples(index=False)
    ]


def _rows_of(table: pd.DataFrame, candidate: Candidate) -> "pd.Series[bool]":
    return (
        (table["mode"] == candidate.mode)
        & (table["workers"] == candidate.workers)
        & (table["prefill_tokens"] == candidate.prefill_tokens)
    )


def _run(arguments: Sequence[str], results: Path) -> dict[str, Any]:
    """``splitwiser run`` in a process of its own: its row of ``throughput.csv``. Raises :class:`RunError` if it fails."""
    before = set(results.glob("*/throughput.csv"))
    command = [sys.executable, "-m", "splitwiser", "run", *arguments, "--results", str(results)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate()
    except BaseException:
        process.terminate()  # it ends its workers and writes what it has
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if process.returncode:
        lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
        raise RunError(f"the check '{shlex.join(arguments)}' failed: {lines[-1].removeprefix('splitwiser: ')}")
    (written,) = set(results.glob("*/throughput.csv")) - before
    return {str(name): value for name, value in pd.read_csv(written).iloc[0].items()}


class _Record:
    """``advice.yaml``: written anew as more is known."""

    def __init__(self, directory: Path, config: AdviseConfig, requests: Sequence[Request]) -> None:
        self._path = directory / "advice.yaml"
        lengths = [len(request.prompt_token_ids) for request in requests]
        self._content: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": git_commit(),
            "configuration": {each.name: getattr(config, each.name) for each in option_fields(AdviseConfig)},
            "requests": {
                "count": len(requests),
                "prompt_tokens": {"least": min(lengths), "median": median(lengths), "greatest": max(lengths)},
                "last_arrival_s": max(request.arrival_s for request in requests),
            },
            "machine": describe_machine(resolve_device(config.device_name)),
            "versions": describe_versions(),
        }

    def add(self, advice: Advice, basis: Basis) -> None:
        """Take in the outcome."""
        self._content |= {
            "split": advice.split,
            "recommended": advice.best.row,
            "command": advice.command,
            "reasons": advice.reasons,
            "median_errors": advice.errors,
            "answers_end": "as a sample of them did" if basis.output_tokens else "at their greatest length",
            "step_costs": {
                threads: {
                    "prefill": list(costs.prefill_coefficients),
                    "decode": [list(line) for line in costs.decode_lines],
                }
                for threads, costs in basis.costs.items()
            },
        }

    def write(self, status: Status) -> None:
        """Write it."""
        replace(self._path, yaml.safe_dump({"status": status, **self._content}, sort_keys=False, allow_unicode=True))
