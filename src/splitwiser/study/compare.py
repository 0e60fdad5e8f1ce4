"""``splitwiser compare``: variants of a run on the same requests, interleaved in rounds, each run in a fresh process."""

import itertools
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from splitwiser.check import check_quickly, check_thoroughly
from splitwiser.config import RunConfig
from splitwiser.errors import InputError, RunError
from splitwiser.files import make_run_directory, write_rows
from splitwiser.machine.stand_in import is_stand_in
from splitwiser.model.checkpoints.catalog import resolve_model
from splitwiser.options import split_options, to_arguments
from splitwiser.placement.modes import find_backend
from splitwiser.results.answer import answer
from splitwiser.results.busy import describe_busy
from splitwiser.results.paired import Made, SummaryRow, TokenDifference, compare_tokens, summarise
from splitwiser.results.record import Record, read_environment
from splitwiser.results.schema import METRIC, Column, column, columns_of, names
from splitwiser.results.terminal import columns
from splitwiser.study.capacity import check_load, measure_capacity, rate_at
from splitwiser.study.fresh_runs import (
    NAME,
    RUN_COLUMNS,
    Execute,
    OneProcess,
    Outcome,
    RoundsBar,
    check_one_process,
    run_once,
)
from splitwiser.study.peers.run import MODELS, Peer, check_peer, read_peer, run_peer, share_with_peers, without_requests
from splitwiser.workload.job import Job

# besides the requests and sampling, what all variants must share
ASKED = ("model", "load_format", "seed", "adapters", "use_adapter")


@dataclass(frozen=True)
class Variant:
    """A run to compare: its name and options, and the peer if another engine runs it."""

    name: str
    options: Mapping[str, Any]
    peer: Peer | None = None

    @property
    def config(self) -> RunConfig:
        """Its full configuration. Raises :class:`InputError`."""
        return RunConfig(**self.options)

    def over(self, options: Mapping[str, Any]) -> "Variant":
        """Return this variant with ``options`` overriding its own."""
        return Variant(self.name, {**self.options, **options}, self.peer)

    def run(self, folder: Path, label: str, show: Callable[[str], None], execute: Execute | None) -> Outcome:
        """Run it once; the arguments are as for :func:`~splitwiser.study.fresh_runs.run_once`."""
        if self.peer is not None:
            return run_peer(self.peer, self.config, folder, label, show)
        return run_once(self.options, folder, label, show, execute)


@dataclass(frozen=True)
class TokenCheck(TokenDifference):
    """A row of ``comparison_tokens.csv``: how a run's tokens differ, and whether they must be equal (float32, greedy)."""

    round: int = column("Number of the round, from 1.")
    variant: str = column("Name of the variant.")
    run_id: str = column("Name of the run's folder.")
    must_match: bool = column("Whether the tokens must be the same: float32, greedy.")


COMPARISON = (
    Column("round", "Number of the round, from 1."),
    Column("variant", "Name of the variant."),
    *RUN_COLUMNS,
    Column("version", "Version of a peer; empty for this project's own runs."),
)
SUMMARY = columns_of(SummaryRow)
TOKEN_CHECKS = columns_of(TokenCheck)
TABLES = {"comparison.csv": COMPARISON, "comparison_summary.csv": SUMMARY, "comparison_tokens.csv": TOKEN_CHECKS}


def make_variants(
    base: Mapping[str, Any],
    modes: Sequence[str],
    described: Sequence[str],
    peers: Sequence[str] = (),
    backends: Sequence[str] = (),
) -> list[Variant]:
    """Return one for each of ``modes`` (on each of ``backends``, if given), then one for each of ``described``, such as
    ``two: --mode mp --workers two.yaml``, and one for each of ``peers``, such as ``vllm=ENVIRONMENT``; all with the options
    of ``base``, which their own override. Raises :class:`InputError`."""
    if backends and not modes:
        raise InputError("--backends are compared in modes; name them by --modes")
    variants = [Variant(mode, {**base, "mode": mode}) for mode in modes] if not backends else []
    for backend in backends:
        # where another back end lies is nothing to this project's own
        own = base if find_backend(backend).python else {**base, "backend_python": None}
        variants += [Variant(f"{backend}-{mode}", {**own, "mode": mode, "backend": backend}) for mode in modes]
    for text in described:
        name, colon, options = text.partition(":")
        if not colon or not NAME.fullmatch(name):
            raise InputError(f"--variant '{text}': must be a name, a colon and options, such as 'four: --mode mp'")
        try:
            own = split_options(options, RunConfig)
        except InputError as error:
            raise InputError(f"--variant {name}: {error.cli_message}") from error
        if "results" in own:
            raise InputError(f"--variant {name}: --results is the comparison's; give it outside of the variant")
        variants.append(Variant(name, {**base, **own}))
    variants += [Variant(peer.engine, base, peer) for peer in map(read_peer, peers)]
    given = [variant.name for variant in variants]
    if len(given) < 2:
        raise InputError("a comparison needs two variants or more; name them by --modes, --variant and --peer")
    for name in given:
        if given.count(name) > 1:
            raise InputError(f"two variants are named '{name}'; give each a name of its own")
    return variants


def compare(
    variants: Sequence[Variant],
    rounds: int,
    minutes: float | None = None,
    *,
    load: float | None = None,
    one_process: bool = False,
) -> Path:
    """Run every variant ``rounds`` times, print the table and return the comparison's folder. After ``minutes`` no further
    round starts; with ``one_process``, all runs are in one process
    (:class:`~splitwiser.study.fresh_runs.OneProcess`). With ``load``, requests arrive as a Poisson process at that fraction
    of the rate at which the first variant answers them when all arrive at once, which is measured first.

    The order rotates by one variant per round, so that over as many rounds as variants each runs once in every position.
    A failed run does not stop the others. Raises :class:`InputError` before anything has run if a variant is
    wrong or has other requests than the first; :class:`RunError`, after everything is written, if a run failed or tokens
    differ that must be equal.
    """
    if rounds < 1:
        raise InputError(f"--repeats must be 1 or more, not {rounds}")
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes must be more than 0, not {minutes}")
    last_start_s = time.monotonic() + 60 * (float("inf") if minutes is None else minutes)
    engines = [variant.peer.engine for variant in variants if variant.peer is not None]
    if engines and (one_process or load is not None):
        raise InputError(f"--peer cannot be given with {'--one_process' if one_process else '--load'}; leave one out")
    if one_process:
        check_one_process(variant.config for variant in variants)
    job = _check_same_question(variants, load)
    first = variants[0].config
    folder = make_run_directory(
        Path(first.results), "compare", resolve_model(first.model, first.models).name, job.label
    )
    record = Record(folder / "compare.yaml", _sections(variants, rounds, load, one_process))
    rows: list[dict[str, Any]] = []
    try:
        with record.running():
            if engines:
                asked = share_with_peers(first, job, folder, engines)
                variants = [
                    Variant(each.name, {**without_requests(each.options), **asked}, each.peer) for each in variants
                ]
            runs = rounds * len(variants) + (load is not None)
            with RoundsBar(runs) as bar, OneProcess() if one_process else nullcontext() as execute:
                if load is not None:
                    name, options = variants[0].name, variants[0].options
                    capacity = measure_capacity(name, options, folder, f"capacity_{name}", bar, execute)
                    variants = [each.over({"request_rate": rate_at(load, capacity)}) for each in variants]
                    record.content |= {
                        "capacity": {"variant": name, "requests_per_s": capacity},
                        "variants": _configs(variants),
                    }
                for number, variant in _turns(variants, rounds, last_start_s):
                    bar.begin(f"round {number}/{rounds}, {variant.name}")
                    outcome = variant.run(folder, f"round{number}_{variant.name}", bar.show, execute)
                    rows.append({"round": number, "variant": variant.name, **outcome.row})
                    write_rows(folder / "comparison.csv", names(COMPARISON), rows)
                    if "machine" not in record.content and variant.peer is None:
                        record.content |= _where_it_ran(outcome)
                    bar.end(outcome)
    finally:
        shutil.rmtree(folder / MODELS, ignore_errors=True)  # large, and can be regenerated from the seed
        faults = conclude(folder, variants, rows)
    if faults:
        raise RunError(f"{'; '.join(faults)}; see {folder}")
    return folder


def _check_same_question(variants: Sequence[Variant], load: float | None) -> Job:
    asked: dict[str, Any] = {}
    for variant in variants:
        with _naming(variant):
            config = variant.config
            if load is not None:
                check_load(load, config)
            job = check_quickly(config)
            if variant.peer is not None:
                check_peer(config, job)
        asks = {name: getattr(config, name) for name in ASKED}
        asks |= {"requests": job, "sampling": job.sampling_params(config)}
        asked = asked or asks
        for name, value in asks.items():
            if value != asked[name]:
                raise InputError(
                    f"variant {variant.name} differs from {variants[0].name} in its {name}; all variants must use one model "
                    "and the same requests (splitwiser sweep varies them)"
                )
    for variant in variants:  # after what needs no PyTorch was checked of all
        with _naming(variant):
            check_thoroughly(variant.config)
    requests = asked["requests"]
    assert isinstance(requests, Job)
    return requests


@contextmanager
def _naming(variant: Variant) -> Iterator[None]:
    """Have errors in the context begin with the variant's name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"variant {variant.name}: {error.cli_message}") from error


def _turns(variants: Sequence[Variant], rounds: int, last_start_s: float) -> Iterator[tuple[int, Variant]]:
    for number in range(rounds):
        if number and time.monotonic() > last_start_s:
            return
        turned = number % len(variants)
        for variant in [*variants[turned:], *variants[:turned]]:
            yield number + 1, variant


def _configs(variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    return {each.name: {"peer": str(each.peer)} if each.peer else asdict(each.config) for each in variants}


def _sections(variants: Sequence[Variant], rounds: int, load: float | None, one_process: bool) -> dict[str, Any]:
    command = ["splitwiser", "compare", f"--repeats={rounds}", f"--results={variants[0].config.results}"]
    command += to_arguments({"load": load})
    command += ["--one_process"] if one_process else []
    of_peers: list[str] = []
    for variant in variants:
        own = to_arguments({name: value for name, value in variant.options.items() if name != "results"})
        if variant.peer is None:
            command += ["--variant", f"{variant.name}: {shlex.join(own)}"]
        else:
            command += ["--peer", str(variant.peer)]
            of_peers = own  # the same for all peers; variants have their own
    command += of_peers
    return {
        "command": shlex.join(command),
        "repeats": rounds,
        "processes": "one for all runs" if one_process else "one for each run",
        "order": "a round starts one variant later than the one before",
        "load": load,
        "variants": _configs(variants),
    }


def _where_it_ran(outcome: Outcome) -> dict[str, Any]:
    """Return the environment that a finished run recorded: this process does not use the device."""
    if outcome.status != "finished" or outcome.directory is None:
        return {}
    return read_environment(outcome.directory / "run.yaml")


def conclude(folder: Path, variants: Sequence[Variant], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write and print the summary of ``rows``; returns the faults."""
    failed = sum(row["status"] == "failed" for row in rows)
    faults = [f"{failed} of {len(rows)} runs failed"] if failed else []
    if failed < len(rows):
        if len({is_stand_in(row["device"]) for row in rows if row["status"] == "finished"}) > 1:
            print("figures: withheld, since some runs used a stand-in for a GPU, whose times mean nothing")
        else:
            written = pd.read_csv(folder / "comparison.csv")
            summary = summarise(written, [variant.name for variant in variants])
            write_rows(folder / "comparison_summary.csv", names(SUMMARY), map(asdict, summary))
            print(f"{_table(summary, variants[0].name)}\n{answer(summary)}\n{_note(summary)}")
            if busy := describe_busy(written, "variant"):
                print(f"busy: {busy}; compare again while nothing else runs")
        checks = list(_check_tokens(folder, variants, rows))
        if checks:
            write_rows(folder / "comparison_tokens.csv", names(TOKEN_CHECKS), map(asdict, checks))
        for said, is_fault in _token_lines(checks, variants[0].name):
            print(f"tokens: {said}")
            faults += [said] if is_fault else []
    print(f"results: {folder}")
    return faults


def _check_tokens(folder: Path, variants: Sequence[Variant], rows: Sequence[Mapping[str, Any]]) -> Iterator[TokenCheck]:
    """Compare each finished run's tokens with those of the first variant's first finished run, if there is one."""
    first = variants[0]
    peers = [variant.name for variant in variants if variant.peer is not None]
    finished = [row for row in rows if row["status"] == "finished"]
    reference = next((row for row in finished if row["variant"] == first.name), None)
    if reference is None:
        return
    expected = _read_tokens(folder, reference)
    for row in finished:
        rounded = any(each["dtype"] != "float32" or each.get("kv_dtype", "auto") != "auto" for each in (row, reference))
        exact = first.config.temperature == 0 and not rounded
        comparable = row["variant"] not in peers and first.name not in peers
        must_match = exact and comparable and row["backend"] == reference["backend"]
        difference = compare_tokens(_read_tokens(folder, row), expected)
        yield TokenCheck(
            **asdict(difference),
            round=row["round"],
            variant=row["variant"],
            run_id=row["run_id"],
            must_match=must_match,
        )


def _read_tokens(folder: Path, row: Mapping[str, Any]) -> dict[int, Made]:
    path = folder / "runs" / row["run_id"] / "tokens.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = table[["request_id", "prompt_token_ids", "token_ids"]]
    return {int(number): (prompt, made) for number, prompt, made in columns.to_numpy()}


def _token_lines(checks: Sequence[TokenCheck], first: str) -> Iterator[tuple[str, bool]]:
    """Yield lines about the comparison of tokens, and whether each is a fault; a variant is described by its worst run."""
    if not checks:
        yield f"not compared, since no run of {first} finished", False
    elif len(checks) > 1 and not any(each.differ or each.other_prompts for each in checks):
        yield f"the same for all {checks[0].requests} requests in every run", False
    by_differences = sorted(checks, key=lambda each: (each.other_prompts, each.differ))
    for variant, worst in {each.variant: each for each in by_differences}.items():
        if worst.other_prompts:
            yield f"{variant} was given {worst.other_prompts} other prompts than {first}", True
        if worst.differ:
            where = "" if worst.first_difference is None else f", first at token {worst.first_difference:.0f} (median)"
            why = (
                ""
                if worst.must_match
                else "; rounding may cause this below float32 or in another engine, and so may sampling"
            )
            line = f"{variant} differs from {first} in {worst.differ} of {worst.requests} requests{where}{why}"
            yield line, worst.must_match


def _table(summary: Sequence[SummaryRow], first: str) -> str:
    lines = [("", "", "median (least to greatest)", f"over {first}", "")]
    for metric, of in itertools.groupby(summary, key=lambda row: row.metric):
        for number, row in enumerate(of):
            values = _range(row.median, row.least, row.greatest)
            ratios = _range(row.ratio_median, row.ratio_least, row.ratio_greatest)
            title = "" if number else METRIC[metric].title_with_unit
            lines.append((title, row.variant, values, ratios, row.verdict or ""))
    return columns(lines)


def _note(summary: Sequence[SummaryRow]) -> str:
    rounds = max(row.rounds for row in summary)
    return (
        f"better, worse: the 95% interval of the ratio, paired over {rounds} rounds, excludes 1; equal: it is narrow "
        "around 1; undecided: neither, and more rounds narrow it"
        if rounds > 1
        else "one round does not show noise; use --repeats 3 or more"
    )


def _range(median: float | None, least: float | None, greatest: float | None) -> str:
    if median is None or least is None or greatest is None:
        return "-"
    return _figure(median) if least == greatest else f"{_figure(median)} ({_figure(least)} to {_figure(greatest)})"


def _figure(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"
