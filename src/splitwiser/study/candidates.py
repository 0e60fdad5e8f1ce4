"""The candidate placements of the phases, and the measurements of each that predictions are based on."""

import dataclasses
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from tqdm import tqdm

from splitwiser.engine.schedule import measures_budget, saturating_tokens
from splitwiser.engine.steps import SHORT_PROMPT
from splitwiser.errors import InputError
from splitwiser.files import CsvTable, write_rows
from splitwiser.llm import LLM
from splitwiser.machine.describe import describe_machine
from splitwiser.machine.device import release_memory, resolve_device
from splitwiser.machine.load import LoadMeter, MachineLoad
from splitwiser.model.loading import LoadedModel
from splitwiser.options import option_fields
from splitwiser.placement.checks import find_mode_problem
from splitwiser.placement.config import ModelConfig
from splitwiser.placement.cores import plan_threads
from splitwiser.placement.layout import ONE_MIXED, ONE_OF_EACH, WorkerLayout, parse_layout
from splitwiser.placement.modes import MODES
from splitwiser.request import Request, SamplingParams
from splitwiser.results.schema import METRIC, Column, column, columns_of, names
from splitwiser.study.calibrate import Recording, conditions_of, size_steps
from splitwiser.study.config import AdviseConfig, ProfileConfig
from splitwiser.study.simulate import Conditions
from splitwiser.study.step_times import StepCosts, fit_costs

BUDGETS = (256, 512, 1024)  # prefill tokens per step that are predicted besides the configured number

SCHEDULES = ("alternate", "hybrid")  # that are predicted for mixed workers

_SHARES = (25, 50, 75)  # percent for prefill; decode gets the rest
_SAMPLE = 16  # requests of a calibration run
_SAMPLE_TOKENS = 64  # most new tokens of each; more would add no information
_GPU_MODES = [mode.name for mode in MODES.values() if mode.needs_gpu]


@dataclass(frozen=True)
class Candidate:
    """A mode, workers, prefill budget and, for mixed workers, a schedule to run the workload with."""

    mode: str = column("Placement of the two phases.")
    workers: str = column("Layout of the workers, as --workers takes it; empty for the mode's own.")
    prefill_tokens: int = column("Maximum prompt tokens in one prefill step, or of all in a hybrid one.", "tokens")
    schedule: str = column("What mixed workers run next (--schedule); empty without any.", default="")

    @classmethod
    def of(cls, row: Mapping[Hashable, Any]) -> "Candidate":
        """Return the candidate that has the columns of ``row``."""
        return cls(str(row["mode"]), str(row["workers"]), int(row["prefill_tokens"]), str(row["schedule"]))

    @property
    def layout(self) -> WorkerLayout:
        """Its workers."""
        return parse_layout(self.workers) if self.workers else MODES[self.mode].layout or ONE_MIXED

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
        schedule = f", {self.schedule}" if self.schedule else ""
        return f"{self.mode}{workers}{schedule}, {self.prefill_tokens} prefill tokens a step"


CANDIDATE = columns_of(Candidate)
PLACEMENTS = (
    *(each for each in CANDIDATE if each.name in ("mode", "workers")),
    Column("blocks", "Blocks of the KV pool.", "blocks"),
    *columns_of(Conditions),
    Column("steps", "Steps that the factors were computed from.", "steps"),
    Column("not_possible", "Why this machine cannot run the placement; empty if it can."),
    METRIC["machine_busy"],
)
OUTPUT_TOKENS = (Column("output_tokens", "Tokens of an answer that ended by itself, in a sample.", "tokens"),)


@dataclass(frozen=True)
class MeasuredPlacement:
    """A measured placement: its conditions, and the blocks of its KV pool."""

    mode: str
    workers: str
    conditions: Conditions
    blocks: int


@dataclass(frozen=True)
class ImpossiblePlacement:
    """A placement that this machine cannot run, and why."""

    mode: str
    workers: str
    reason: str


@dataclass(frozen=True)
class Measurements:
    """The measurements behind predictions, written by :func:`measure_placements` and read by :func:`read_measurements`.

    ``costs`` are by thread count; ``cores`` is the number of CPU cores, None on a GPU; ``output_tokens`` are the lengths of
    a sample of answers that ended by themselves; ``busy`` names what was measured while the machine was busy.
    """

    costs: Mapping[int, StepCosts]
    cores: int | None
    placements: Sequence[MeasuredPlacement]
    impossible: Sequence[ImpossiblePlacement]
    output_tokens: Sequence[int]
    busy: Sequence[str] = ()


def short_profile(config: AdviseConfig, requests: Sequence[Request]) -> ProfileConfig:
    """Return the profile that predictions of ``requests`` need: their prompt and batch sizes, all thread counts."""
    lengths = sorted(len(request.prompt_token_ids) for request in requests)
    longest = max(request.max_kv_tokens for request in requests)
    batch = min(config.max_batch, len(requests))
    threads = set()
    if resolve_device(config.device_name).type == "cpu":
        cores = describe_machine(torch.device("cpu"))["cores"]
        for _, workers in placements("cpu", cores):
            layout = parse_layout(workers) if workers else ONE_OF_EACH
            threads |= {cores, *plan_threads(layout.workers, cores)}

    def text(numbers: set[int]) -> str:
        return ",".join(map(str, sorted(numbers)))

    return ProfileConfig(
        **{name: getattr(config, name) for name in option_fields(ModelConfig)},
        prompt_lengths=text({max(1, lengths[0] // 2), lengths[0], lengths[len(lengths) // 2], lengths[-1]}),
        prompts="4,16",
        starts=str(min(BUDGETS)),
        batch_sizes=text({1, batch} | {size for size in (4, 16) if size < batch}),
        contexts=text({max(2, lengths[0] + 1), max(2, longest)}),
        threads=text(threads),
        repeats=3,
    )


def placements(device: str, cores: int) -> list[tuple[str, str]]:
    """Return the (mode, workers) to predict on ``device`` (cpu or cuda), as options of a run.

    On a CPU, shares with equal thread counts are listed once, and those that need more threads than ``cores`` are left out;
    on a GPU, mode ``mp`` has no shares.
    """
    found = [("sequential", ""), ("mp", "")]
    shared = [(f"[{{role: prefill, share: {share}}}, {{role: decode, share: {100 - share}}}]") for share in _SHARES]
    if device != "cpu":
        return found + [(mode, workers) for mode in _GPU_MODES for workers in shared]
    seen = [plan_threads(ONE_OF_EACH.workers, cores)]
    for workers in shared:
        threads = plan_threads(parse_layout(workers).workers, cores)
        if threads not in seen and sum(threads) <= cores:
            seen.append(threads)
            found.append(("mp", workers))
    return found


def candidates_of(mode: str, workers: str, budgets: Mapping[str, Sequence[int]]) -> list[Candidate]:
    """Return the candidates of a placement: those of each schedule with its ``budgets`` if it has mixed workers, else with
    the budgets of the first schedule."""
    mixes = any(spec.role == "mixed" for spec in Candidate(mode, workers, 1).layout.workers)
    if not mixes:
        return [Candidate(mode, workers, budget) for budget in budgets[SCHEDULES[0]]]
    return [Candidate(mode, workers, budget, schedule) for schedule in SCHEDULES for budget in budgets[schedule]]


def budgets_of(config: AdviseConfig, requests: Sequence[Request], costs: StepCosts) -> dict[str, list[int]]:
    """Return the budgets to predict ``requests`` with, by schedule. The first, which wins ties, is the configured one or,
    where a run would measure it, that of the predicted ``costs``; smaller ones of :data:`BUDGETS` follow."""
    tokens = sum(len(request.prompt_token_ids) for request in requests)

    def step_s(size: int) -> float:
        length = min(size, SHORT_PROMPT)
        return costs.prefill([(0, length)] * (size // length))

    budgets = {}
    for schedule in SCHEDULES:
        measured = config.prefill_tokens is None and measures_budget(schedule)
        first = saturating_tokens(step_s, config.step_tokens) if measured else config.step_tokens
        budgets[schedule] = [first, *(each for each in BUDGETS if each < min(tokens, first))]
    return budgets


def measure_placements(config: AdviseConfig, requests: Sequence[Request], directory: Path) -> None:
    """Run a sample of ``requests`` in each placement and write ``placements.csv`` and ``output_tokens.csv``."""
    device = resolve_device(config.device_name)
    cores = describe_machine(device)["cores"]
    costs = fit_costs(pd.read_csv(directory / "prefill.csv"), pd.read_csv(directory / "decode.csv"))
    table = CsvTable(directory / "placements.csv", names(PLACEMENTS))
    sample = requests[:: -(-len(requests) // _SAMPLE)]
    listed = placements(device.type, cores)
    for mode in _GPU_MODES:
        problem = find_mode_problem(mode, str(device))
        if problem:
            table.write({"mode": mode, "workers": "", "not_possible": problem})
            listed = [each for each in listed if each[0] != mode]
    with tqdm(listed, desc="calibration", unit="placement") as bar:
        for mode, workers in bar:
            bar.set_postfix_str(f"{mode} {workers}")
            row = {"mode": mode, "workers": workers}
            stretch = LoadMeter()
            try:
                recording, blocks = _run_sample(config, mode, workers, sample)
            except InputError as error:
                if mode == "sequential":
                    raise
                table.write(row | {"not_possible": str(error)})
                continue
            busy = MachineLoad(during=stretch.end()).busy
            layout = Candidate(mode, workers, config.step_tokens).layout
            steps = size_steps(recording)
            conditions = conditions_of(steps, costs, layout, cores if device.type == "cpu" else None, config.lend)
            found = {"blocks": blocks, "steps": len(steps), "machine_busy": busy}
            table.write(row | asdict(conditions) | found)
            if mode == "sequential":
                made = {output.request_id: len(output.token_ids) for output in recording.outputs}
                ended = (made[place] for place, each in enumerate(sample) if not each.params.is_exact)
                lengths = ({"output_tokens": length} for length in ended)
                write_rows(directory / "output_tokens.csv", names(OUTPUT_TOKENS), lengths)


def _run_sample(config: AdviseConfig, mode: str, workers: str, sample: Sequence[Request]) -> tuple[Recording, int]:
    """Run ``sample`` with all arrivals at once; returns its recording and the number of blocks of the KV pool."""
    release_memory()
    total = sum(len(request.prompt_token_ids) for request in sample)
    # several prefill steps, so that most of them overlap decode steps
    prefill_tokens = min(config.step_tokens, max(64, total // 8))
    with LLM(config=config, mode=mode, workers=workers, prefill_tokens=prefill_tokens) as llm:
        prompts, params = zip(*((each.prompt_token_ids, _sample_params(each)) for each in sample), strict=True)
        recording = Recording()
        llm.run(llm.make_requests(prompts, params), recording, time.perf_counter_ns())
        assert llm.started.pool is not None
        return recording, llm.started.pool.blocks


def _sample_params(request: Request) -> SamplingParams:
    params = dataclasses.replace(request.params, n=1)  # each sample of a prompt is a request already
    if not params.is_exact:
        return params
    most = min(request.max_tokens, _SAMPLE_TOKENS)
    return dataclasses.replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))


def read_measurements(directory: Path, shell: LoadedModel) -> Measurements:
    """Return what :func:`measure_placements` and the profile before it wrote into ``directory``, for the model ``shell``.

    Raises :class:`InputError` for an incomplete folder or one of another model.
    """
    where = f"--profile {directory}"
    for name in ("prefill.csv", "decode.csv", "placements.csv"):
        if not (directory / name).is_file():
            raise InputError(f"{where}: no {name} in it; give the folder of an earlier advise")
    record = yaml.safe_load((directory / "profile.yaml").read_text(encoding="utf-8"))
    model = record["model"]
    dtype = str(shell.dtype).removeprefix("torch.")
    if (model["name"], model["dtype"]) != (shell.name, dtype):
        raise InputError(
            f"{where}: was measured on {model['name']} in {model['dtype']}, not on {shell.name} in {dtype}"
        )
    rows = pd.read_csv(directory / "placements.csv", keep_default_na=False)
    measured: list[MeasuredPlacement] = []
    impossible: list[ImpossiblePlacement] = []
    busy = ["the profile"] if (record.get("load") or {}).get("busy") else []
    for row in rows.to_dict("records"):
        mode, workers = str(row["mode"]), str(row["workers"])
        if row["not_possible"]:
            impossible.append(ImpossiblePlacement(mode, workers, str(row["not_possible"])))
            continue
        conditions = Conditions(**{each.name: float(row[each.name]) for each in fields(Conditions)})
        measured.append(MeasuredPlacement(mode, workers, conditions, int(float(row["blocks"]))))
        if str(row.get("machine_busy")) == "True":
            busy.append(f"the sample in mode {' with '.join(filter(None, (mode, workers)))}")
    if not measured:
        raise InputError(f"{where}: its placements.csv has no placement; give the folder of an advise that finished")
    lengths = directory / "output_tokens.csv"  # empty if every answer has a fixed length
    return Measurements(
        costs=fit_costs(pd.read_csv(directory / "prefill.csv"), pd.read_csv(directory / "decode.csv")),
        cores=record["machine"]["cores"] if record["configuration"]["device"] == "cpu" else None,
        placements=measured,
        impossible=impossible,
        output_tokens=pd.read_csv(lengths)["output_tokens"].tolist() if lengths.exists() else [],
        busy=busy,
    )
