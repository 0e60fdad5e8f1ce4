"""Profiles the two phases of a model on this machine: runs and times steps of known sizes one by one."""

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import pandas as pd
import torch
from tqdm import tqdm

from splitwiser.engine.messages import Phase
from splitwiser.engine.steps import Chunk, SequenceState, make_stepper
from splitwiser.errors import InputError
from splitwiser.files import CsvTable, make_directory, write_rows
from splitwiser.machine.describe import peak_memory_mb, reset_peak_memory
from splitwiser.machine.load import LoadMeter, MachineLoad, measure_load
from splitwiser.machine.nvml import NO_ACTIVITY, Monitor, open_monitor
from splitwiser.model.kv_pool import BlockAllocator
from splitwiser.options import option_fields, whole_numbers
from splitwiser.placement.config import EngineConfig, ModelConfig
from splitwiser.placement.prepare import load, make_pool, prepare_alone
from splitwiser.request import Request, SamplingParams
from splitwiser.results.record import Record
from splitwiser.results.schema import CEILINGS, DECODE, PREFILL, Column, names
from splitwiser.results.terminal import columns
from splitwiser.study.ceilings import Ceilings, ceilings_of, measure_ceilings
from splitwiser.study.config import ProfileConfig
from splitwiser.study.operations import Architecture, StepWork, count_architecture

SUMMARY = (
    Column("phase", "prefill or decode."),
    Column("step", "The step's size: prompts x tokens after those computed before, or requests x context."),
    *(
        each
        for each in DECODE
        if each.name in ("threads", "ms", "tokens_per_s", "tflops", "gb_s", "share_of_compute", "share_of_bandwidth")
    ),
    Column("limit", "What limits the step according to the roofline: compute or memory."),
)
TABLES = {"prefill.csv": PREFILL, "decode.csv": DECODE, "ceilings.csv": CEILINGS, "summary.csv": SUMMARY}

_LEAST_S = 0.2  # minimum seconds of a point's measured steps together
_UNSTEADY = 1.5
_ABOVE = 1.03  # of the roofline: more than ceilings differ between two measurements of an idle machine
_LEAST_SAMPLED_S = 1.0  # with NVML, whose counters are means over up to a second


@dataclass(frozen=True)
class PrefillPoint:
    """A step over ``prompt_tokens`` tokens of each of ``prompts`` prompts, after ``start_tokens`` of earlier steps."""

    phase: ClassVar[Phase] = "prefill"
    threads: int
    prompts: int
    start_tokens: int
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return self.prompts * self.prompt_tokens

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request's prompt that are in the pool after the step."""
        return [self.start_tokens + self.prompt_tokens] * self.prompts

    def cost(self, architecture: Architecture) -> StepWork:
        """Its operations and bytes."""
        return architecture.prefill([(self.start_tokens, self.prompt_tokens)] * self.prompts, rows=self.prompts)

    def run(self, bench: "Bench", sequences: Sequence[SequenceState]) -> None:
        """Run the step."""
        chunks = [Chunk(sequence, self.start_tokens, self.prompt_tokens) for sequence in sequences]
        bench.stepper.prefill(chunks)

    def __str__(self) -> str:
        packed = f"{self.prompts} x " if self.prompts > 1 else ""
        return f"{packed}{self.prompt_tokens}" + (f" after {self.start_tokens}" if self.start_tokens else "")


@dataclass(frozen=True)
class DecodePoint:
    """A step of one token for each of ``batch`` requests, with ``context`` tokens of each in the KV pool after it."""

    phase: ClassVar[Phase] = "decode"
    threads: int
    batch: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return self.batch

    @property
    def lengths(self) -> list[int]:
        """Tokens that each request has in the pool after the step."""
        return [self.context] * self.batch

    def cost(self, architecture: Architecture) -> StepWork:
        """Its operations and bytes."""
        return architecture.decode(self.lengths)

    def run(self, bench: "Bench", sequences: Sequence[SequenceState]) -> None:
        """Run the step; its tokens are discarded, so that it can be repeated."""
        bench.stepper.decode(sequences)

    def __str__(self) -> str:
        return f"{self.batch} x {self.context}"


Point = PrefillPoint | DecodePoint
Measured = tuple[Point, dict[str, Any]]  # a point and its row


@dataclass(frozen=True)
class ProfileResult:
    """A finished profile: its folder, the rows of ``summary.csv`` and the load of the machine meanwhile."""

    directory: Path
    summary: pd.DataFrame
    load: MachineLoad


def profile(config: ProfileConfig) -> ProfileResult:
    """Profile into a new folder ``profile_<model>_<UTC time>``; shows a progress bar.

    Raises :class:`InputError` before the folder is made if the input is wrong. If it ends early, the folder has the
    measurements so far.
    """
    bench = Bench(config)
    return bench.measure(make_directory(Path(config.results), f"profile_{bench.model.name}"))


class Bench:
    """A model with a KV pool, as in mode ``sequential``, and the points of ``config`` that it can run."""

    def __init__(self, config: ProfileConfig) -> None:
        self.config = config
        self.model = load(config)
        most = max(whole_numbers("batch_sizes", config.batch_sizes))
        engine = EngineConfig(max_batch=most, **{name: getattr(config, name) for name in option_fields(ModelConfig)})
        prepared = prepare_alone(self.model, engine)
        self.pool = make_pool(self.model, prepared)
        self.stepper, graphs = make_stepper(
            self.model, self.pool, most, engine.step_tokens, {"prefill": (), "decode": ()}
        )
        self.kernels = prepared.described | graphs
        self.architecture = count_architecture(self.model, self.pool.dtype)
        self.threads = self._thread_counts()
        self.notes = [*self.model.notes, *self.architecture.notes]
        self.points = self._points()

    def measure(self, directory: Path) -> ProfileResult:
        """Measure every point and write the files of ``directory`` row by row."""
        monitor, monitored = open_monitor(self.model.device)
        self.notes.append(monitored)
        _print_notes(self.notes)
        before = measure_load()
        measured: list[Measured] = []
        ceilings: dict[int, Ceilings] = {}
        record = Record(directory / "profile.yaml", self._sections(), self.model.device)
        stretch = LoadMeter()
        with record.running():
            try:
                self._measure_points(directory, monitor, measured, ceilings)
            finally:
                load = MachineLoad(before, stretch.end())
                found = [*unsteady(measured), *above_ceilings(measured), *filter(None, [load.record["note"]])]
                _print_notes(found)
                self.notes += found
                record.content["load"] = load.record
                summary = summarise(measured, ceilings)
                write_rows(directory / "summary.csv", names(SUMMARY), summary.to_dict("records"))
                if measured:
                    self._draw_roofline(directory / "roofline.png", ceilings[max(ceilings)], measured)
                if monitor:
                    monitor.close()
        return ProfileResult(directory, summary, load)

    def _measure_points(
        self, directory: Path, monitor: Monitor | None, measured: list[Measured], ceilings: dict[int, Ceilings]
    ) -> None:
        """Measure the ceilings of each thread count and every point; adds both to ``measured`` and ``ceilings``."""
        tables = {"ceilings": CEILINGS, "prefill": PREFILL, "decode": DECODE}
        files = {name: CsvTable(directory / f"{name}.csv", names(table)) for name, table in tables.items()}
        self._fill_pool()
        with tqdm(total=len(self.points), desc="profile", unit="point") as bar:
            for threads in self.threads:
                with using_threads(threads):
                    int8 = self.config.quantization == "int8"
                    probes = measure_ceilings(self.model.dtype, self.model.device, int8=int8)
                    ceilings[threads] = ceilings_of(probes)
                    for probe in probes:
                        files["ceilings"].write({"threads": threads, **probe.row()})
                    for point in (each for each in self.points if each.threads == threads):
                        bar.set_postfix_str(f"{point.phase} {point}")
                        row = self._measure(point, ceilings[threads], monitor)
                        files[point.phase].write(row)
                        measured.append((point, row))
                        bar.update()

    def _thread_counts(self) -> tuple[int, ...]:
        given = whole_numbers("threads", self.config.threads)
        if given and self.model.device.type != "cpu":
            raise InputError(f"--threads divides a CPU's cores; the device is {self.model.device}")
        return given or (torch.get_num_threads(),)

    def _points(self) -> list[Point]:
        """Return the configured points that fit the model's positions and the pool; the others are noted. Raises
        :class:`InputError` if a phase has none."""
        config = self.config
        lengths = whole_numbers("prompt_lengths", config.prompt_lengths)
        sizes = [(1, 0, length) for length in lengths]
        sizes += [
            (prompts, 0, length)
            for prompts in whole_numbers("prompts", config.prompts)
            for length in lengths
            if prompts > 1 and prompts * length <= config.step_tokens
        ]
        starts = whole_numbers("starts", config.starts)
        if self.model.encodes and starts:
            self.notes.append("no chunks behind others (--starts): an encoder reads a source at once")
            starts = ()
        sizes += [(1, start, length) for start in starts for length in lengths]
        points: list[Point] = []
        for threads in self.threads:
            points += [PrefillPoint(threads, *size) for size in sizes]
            points += [
                DecodePoint(threads, batch, context)
                for batch in whole_numbers("batch_sizes", config.batch_sizes)
                for context in whole_numbers("contexts", config.contexts)
            ]
        fitting = [point for point in points if self._fits(point)]
        left_out = dict.fromkeys(f"{point.phase} {point}" for point in points if not self._fits(point))
        if left_out:
            self.notes.append(
                f"left out, since {self.model.name} has {self.model.max_positions} positions and the pool holds "
                f"{self.pool.blocks * self.pool.block_tokens} tokens: {', '.join(left_out)}"
            )
        for phase in ("prefill", "decode"):
            if not any(point.phase == phase for point in fitting):
                raise InputError(
                    f"no {phase} step of the sizes given fits: {self.model.name} has {self.model.max_positions} positions "
                    f"and the pool holds {self.pool.blocks * self.pool.block_tokens} tokens (--kv_memory)"
                )
        return fitting

    def _fits(self, point: Point) -> bool:
        prompt, positions = max(self._prompts(point)), self.model.max_positions
        longest = prompt if self.model.encodes else prompt + self._after_prompt(point)
        if prompt < 1:  # a decode step needs at least one earlier token
            return False
        return (positions is None or longest <= positions) and self._blocks(point) <= self.pool.blocks

    def _after_prompt(self, point: Point) -> int:
        """Return how many tokens a request has in the pool beside its prompt: that with which an encoder-decoder's answers
        begin, and in a decode step the newest."""
        return self.model.encodes + isinstance(point, DecodePoint)

    def _prompts(self, point: Point) -> list[int]:
        """Return the length of each request's prompt."""
        if isinstance(point, PrefillPoint):
            return point.lengths
        return [length - self._after_prompt(point) for length in point.lengths]

    def _blocks(self, point: Point) -> int:
        after = self._after_prompt(point)
        return sum(self.pool.blocks_for(prompt + after) for prompt in self._prompts(point))

    def _fill_pool(self) -> None:
        """Fill every block that is read later with random numbers: the system maps all unwritten pages to one page of zeros,
        which would stay in the caches."""
        used = max(map(self._blocks, self.points))
        slots = torch.arange(self.pool.block_tokens, device=self.model.device)
        for number, layer in enumerate(self.pool.layers):
            drawn = (
                torch.randn(len(slots), layer.kv_heads, size, device=slots.device)
                for size in (layer.key_dim, layer.value_dim)
            )
            self.pool.write(number, slots, *(each.to(self.model.dtype) for each in drawn))
            for stored in (self.pool.keys[number], self.pool.values[number]):
                stored[1:used] = stored[0]

    def _sequences(self, point: Point) -> list[SequenceState]:
        allocator = BlockAllocator(0, self.pool.blocks)
        rng = random.Random(self.config.seed)
        sequences = []
        for number, length in enumerate(self._prompts(point)):
            blocks = allocator.allocate(self.pool.blocks_for(length + self._after_prompt(point)))
            assert blocks is not None
            drawn = [rng.randrange(self.model.vocabulary)] if point.phase == "decode" else []
            prompt = tuple(rng.randrange(self.model.vocabulary) for _ in range(length))
            request = Request(number, prompt, SamplingParams(temperature=0), seed=0, encoded=self.model.encodes)
            sequences.append(SequenceState(request, blocks, drawn))
        return sequences

    def _measure(self, point: Point, ceilings: Ceilings, monitor: Monitor | None) -> dict[str, Any]:
        """Return the row of one point: the median time of its steps after a warm-up, and the figures derived from it."""
        sequences = self._sequences(point)
        reset_peak_memory(self.model.device)
        point.run(self, sequences)
        times: list[float] = []
        least_s = _LEAST_SAMPLED_S if monitor else _LEAST_S
        with monitor.watch() if monitor else nullcontext(NO_ACTIVITY) as activity:
            while len(times) < self.config.repeats or sum(times) < least_s:
                began = time.perf_counter()
                point.run(self, sequences)
                times.append(time.perf_counter() - began)
        own = {each.name: getattr(point, each.name) for each in fields(point)}
        row = own | figures(point.cost(self.architecture), point.tokens, times, ceilings)
        row |= {"peak_memory_mb": peak_memory_mb(self.model.device), **activity}
        return row | ({"itl_ms": row["ms"]} if point.phase == "decode" else {})

    def _sections(self) -> dict[str, Any]:
        model, pool = self.model, self.pool
        return {
            "configuration": {**asdict(self.config), "device": str(model.device)},
            "model": {
                "name": model.name,
                "class": type(model.module).__name__,
                "parameters": model.parameters,
                "dtype": str(model.dtype).removeprefix("torch."),
                "load_format": model.load_format,
                "max_positions": model.max_positions,
                "product_weights": self.architecture.product_weights,
                "head_weights": self.architecture.head,
                "expert_weights": sum(each.numbers for each in self.architecture.experts),
            },
            "kv_pool": {"blocks": pool.blocks, "block_tokens": pool.block_tokens, "bytes": pool.nbytes},
            "kernels": self.kernels,
            "notes": self.notes,
            "load_s": model.load_s,
        }

    def _draw_roofline(self, path: Path, ceilings: Ceilings, measured: Sequence[Measured]) -> None:
        """Draw the points with the highest thread count under their ``ceilings``."""
        from splitwiser.results.report.plots import (
            save_roofline,  # matplotlib is slow to import, so not at start-up
        )

        threads = max(point.threads for point, _ in measured)
        shown = [(point, row) for point, row in measured if point.threads == threads and _is_drawn(point)]
        decode = [point for point, _ in shown if isinstance(point, DecodePoint)]
        most, shortest = max((p.batch for p in decode), default=0), min((p.context for p in decode), default=0)
        points = [
            {
                "phase": point.phase,
                "series": f"{point.phase} {point.context}" if isinstance(point, DecodePoint) else point.phase,
                # with few requests contexts hardly differ, so only the shortest is labelled
                "label": ""
                if isinstance(point, DecodePoint) and point.batch < most and point.context > shortest
                else str(point),
                "arithmetic_intensity": row["arithmetic_intensity"],
                "tflops": row["tflops"],
            }
            for point, row in shown
        ]
        dummy = ", dummy weights" if self.model.load_format == "dummy" else ""
        dtype = str(self.model.dtype).removeprefix("torch.")
        cores = f", {threads} threads" if self.model.device.type == "cpu" else ""
        title = f"{self.model.name} in {dtype}{dummy} on {self.model.device}{cores}"
        save_roofline(path, pd.DataFrame(points), ceilings.flops_per_s / 1e12, ceilings.bytes_per_s / 1e9, title)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        tqdm.write(f"note: {note}", file=sys.stderr)


def _is_drawn(point: Point) -> bool:
    return isinstance(point, DecodePoint) or (point.prompts == 1 and not point.start_tokens)


def unsteady(measured: Sequence[Measured]) -> list[str]:
    """Return a note that names the points whose slowest step took over 1.5 times the median, if any."""
    return _note(
        measured,
        lambda row: row["ms_greatest"] > _UNSTEADY * row["ms"],
        f"had steps of more than {_UNSTEADY} times the median; was the machine idle otherwise?",
    )


def above_ceilings(measured: Sequence[Measured]) -> list[str]:
    """Return a note that names the points that were faster than the ceilings allow, if any."""
    return _note(
        measured,
        lambda row: row["share_of_roofline"] > _ABOVE,
        "were faster than the roofline; others use this machine's memory, and left more of it later than while its "
        "ceilings were measured, or a part of the weights stays in a cache",
    )


def _note(measured: Sequence[Measured], is_named: Callable[[dict[str, Any]], bool], said: str) -> list[str]:
    named = [f"{point.phase} {point}" for point, row in measured if is_named(row)]
    if not named:
        return []
    more = ", ..." if len(named) > 5 else ""
    return [f"{len(named)} of {len(measured)} points {said} ({', '.join(named[:5])}{more})"]


def summarise(measured: Sequence[Measured], ceilings: dict[int, Ceilings]) -> pd.DataFrame:
    """Return one row per point, prefill first; ``limit`` is its limit on the roofline, compute or memory."""
    table = [
        {
            "phase": point.phase,
            "step": str(point),
            "limit": "compute" if row["arithmetic_intensity"] > ceilings[point.threads].ridge else "memory",
            **row,
        }
        for point, row in sorted(measured, key=lambda each: each[0].phase == "decode")
    ]
    return pd.DataFrame(table, columns=list(names(SUMMARY)))


def profile_summary(result: ProfileResult) -> str:
    """Return the table for the terminal, and the folder of the files."""
    heading = ("phase", "tokens", "threads", "ms", "tokens/s", "TFLOP/s", "GB/s", "of compute", "of bandwidth", "limit")
    rows = [
        (
            str(row.phase), str(row.step), str(row.threads), f"{row.ms:,.2f}", f"{row.tokens_per_s:,.0f}",
            f"{row.tflops:.3f}", f"{row.gb_s:,.1f}", f"{row.share_of_compute:.0%}", f"{row.share_of_bandwidth:.0%}",
            str(row.limit),
        )
        for row in result.summary.itertuples()
    ]  # fmt: skip
    return f"{columns([heading, *rows])}\nresults  {result.directory}"


def figures(cost: StepWork, tokens: int, times: Sequence[float], ceilings: Ceilings) -> dict[str, Any]:
    """Return the figures of a step of ``tokens`` tokens and ``cost`` from its ``times`` (seconds); rates use the median.

    Units: 10^12 operations and 10^9 bytes per second. A share of bandwidth above 1 means that weights or K and V came from a
    cache. The roofline is the smaller of the rates that compute and memory allow at the step's arithmetic intensity.
    """
    seconds = median(times)
    flops_per_s, bytes_per_s = cost.flops / seconds, cost.nbytes / seconds
    return {
        "ms": seconds * 1e3,
        "ms_least": min(times) * 1e3,
        "ms_greatest": max(times) * 1e3,
        "repeats": len(times),
        "tokens_per_s": tokens / seconds,
        "flops": cost.flops,
        "bytes": cost.nbytes,
        "arithmetic_intensity": cost.intensity,
        "tflops": flops_per_s / 1e12,
        "gb_s": bytes_per_s / 1e9,
        "share_of_compute": flops_per_s / ceilings.flops_per_s,
        "share_of_bandwidth": bytes_per_s / ceilings.bytes_per_s,
        "share_of_roofline": flops_per_s / ceilings.attainable(cost.intensity),
    }


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let PyTorch use ``count`` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
