"""``splitwiser compare``: variants of a run on the same requests, interleaved in rounds, each run in a fresh process."""

import itertools
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from splitwiser.check import check
from splitwiser.config import RunConfig
from splitwiser.errors import InputError, RunError
from splitwiser.machine.stand_in import is_stand_in
from splitwiser.model.catalog import resolve_model
from splitwiser.options import split_options, to_arguments
from splitwiser.results.busy import describe_busy
from splitwiser.results.recorder import TOKEN_COLUMNS, Status, make_run_directory, replace
from splitwiser.results.terminal import columns
from splitwiser.study.fresh_runs import NAME, OneProcess, Outcome, RoundsBar, check_one_process, run_once, write_rows
from splitwiser.study.paired import Made, SummaryRow, TokenDifference, compare_tokens, summarise
from splitwiser.workload.job import Job

RECORD = ("commit", "machine", "versions")  # what compare.yaml takes over from a run's record
ASKED = ("model", "load_format", "seed")  # with the requests and how tokens are drawn, what all variants must share


@dataclass(frozen=True)
class Variant:
    """A run to compare: its name and its options."""

    name: str
    options: Mapping[str, Any]

    @property
    def config(self) -> RunConfig:
        """Its whole configuration. Raises :class:`InputError`."""
        return RunConfig(**self.options)


@dataclass(frozen=True)
class TokenCheck(TokenDifference):
    """A row of ``comparison_tokens.csv``: a run's tokens, and whether they must be the same (float32, greedy)."""

    round: int
    variant: str
    run_id: str
    must_match: bool


def make_variants(base: Mapping[str, Any], modes: Sequence[str], described: Sequence[str]) -> list[Variant]:
    """One for each of ``modes``, then one for each of ``described``, such as ``two: --mode mp --workers two.yaml``; all
    with the options of ``base``, which their own override. Raises :class:`InputError`."""
    variants = [Variant(mode, {**base, "mode": mode}) for mode in modes]
    for text in described:
        name, colon, options = text.partition(":")
        if not colon or not NAME.fullmatch(name):
            raise InputError(f"--variant '{text}': must be a name, a colon and options, such as 'four: --mode mp'")
        try:
            own = split_options(options, RunConfig)
        except InputError as error:
            raise InputError(f"--variant {name}: {error}") from error
        if "results" in own:
            raise InputError(f"--variant {name}: --results is the comparison's; give it outside of the variant")
        variants.append(Variant(name, {**base, **own}))
    names = [variant.name for variant in variants]
    if len(names) < 2:
        raise InputError("a comparison needs two variants or more; name them by --modes and --variant")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two variants are named '{name}'; give each a name of its own")
    return variants


def compare(
    variants: Sequence[Variant], rounds: int, minutes: float | None = None, *, one_process: bool = False
) -> Path:
    """Run every variant ``rounds`` times, print the table and return the comparison's folder. With ``minutes``, no round
    but the first begins after so long; with ``one_process``, all runs are in one process
    (:class:`~splitwiser.study.fresh_runs.OneProcess`).

    The order turns by one variant a round, so that over as many rounds as there are variants each runs once in every
    place. A run that fails leaves the others going. Raises :class:`InputError` before anything has run if a variant is
    wrong or asks for other requests than the first; :class:`RunError`, after all is written, if a run failed or tokens
    differ that must not.
    """
    if rounds < 1:
        raise InputError(f"--repeats must be 1 or more, not {rounds}")
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes must be more than 0, not {minutes}")
    last_start_s = time.monotonic() + 60 * (float("inf") if minutes is None else minutes)
    if one_process:
        check_one_process(variant.config for variant in variants)
    job = _check_same_question(variants)
    first = variants[0].config
    folder = make_run_directory(Path(first.results), "compare", resolve_model(first.model).name, job.label)
    record = _record(variants, rounds, one_process)
    rows: list[dict[str, Any]] = []
    status: Status = "failed"
    _write_record(folder, "running", record)
    try:
        with RoundsBar(rounds * len(variants)) as bar, OneProcess() if one_process else nullcontext() as execute:
            for number, variant in _turns(variants, rounds, last_start_s):
                bar.begin(f"round {number}/{rounds}, {variant.name}")
                outcome = run_once(variant.options, folder, f"round{number}_{variant.name}", bar.show, execute)
                rows.append({"round": number, "variant": variant.name, **outcome.row})
                write_rows(folder / "comparison.csv", rows)
                if "machine" not in record:
                    record |= _where_it_ran(outcome)
                bar.end(outcome)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        _write_record(folder, status, record)
        faults = conclude(folder, variants, rows)
    if faults:
        raise RunError(f"{'; '.join(faults)}; see {folder}")
    return folder


def _check_same_question(variants: Sequence[Variant]) -> Job:
    asked: dict[str, Any] = {}
    for variant in variants:
        try:
            config = variant.config
            job = check(config)
        except InputError as error:
            raise InputError(f"variant {variant.name}: {error}") from error
        asks = {name: getattr(config, name) for name in ASKED}
        asks |= {"requests": job, "sampling": job.sampling_params(config)}
        asked = asked or asks
        for name, value in asks.items():
            if value != asked[name]:
                raise InputError(
                    f"variant {variant.name} differs from {variants[0].name} in its {name}; a comparison is of one model on "
                    "the same requests (splitwiser sweep runs others)"
                )
    requests = asked["requests"]
    assert isinstance(requests, Job)
    return requests


def _turns(variants: Sequence[Variant], rounds: int, last_start_s: float) -> Iterator[tuple[int, Variant]]:
    for number in range(rounds):
        if number and time.monotonic() > last_start_s:
            return
        turned = number % len(variants)
        for variant in [*variants[turned:], *variants[:turned]]:
            yield number + 1, variant


def _record(variants: Sequence[Variant], rounds: int, one_process: bool) -> dict[str, Any]:
    command = ["splitwiser", "compare", f"--repeats={rounds}", f"--results={variants[0].config.results}"]
    command += ["--one_process"] if one_process else []
    for variant in variants:
        own = {name: value for name, value in variant.options.items() if name != "results"}
        command += ["--variant", f"{variant.name}: {shlex.join(to_arguments(own))}"]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "repeats": rounds,
        "processes": "one for all runs" if one_process else "one for each run",
        "order": "a round starts one variant later than the one before",
        "variants": {variant.name: asdict(variant.config) for variant in variants},
    }


def _write_record(folder: Path, status: Status, record: Mapping[str, Any]) -> None:
    text = yaml.safe_dump({"status": status, **record}, sort_keys=False, allow_unicode=True)
    replace(folder / "compare.yaml", text)


def _where_it_ran(outcome: Outcome) -> dict[str, Any]:
    """As a finished run found it: this process stays away from the device."""
    if outcome.status != "finished" or outcome.directory is None:
        return {}
    record = yaml.safe_load((outcome.directory / "run.yaml").read_text(encoding="utf-8"))
    return {name: record[name] for name in RECORD}


def conclude(folder: Path, variants: Sequence[Variant], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write and print what ``rows`` say; returns the faults."""
    failed = sum(row["status"] == "failed" for row in rows)
    faults = [f"{failed} of {len(rows)} runs failed"] if failed else []
    if failed < len(rows):
        if len({is_stand_in(row["device"]) for row in rows if row["status"] == "finished"}) > 1:
            print("figures: withheld, since some runs are of a stand-in for a GPU, whose times say nothing")
        else:
            written = pd.read_csv(folder / "comparison.csv")
            summary = summarise(written, [variant.name for variant in variants])
            write_rows(folder / "comparison_summary.csv", [asdict(row) for row in summary])
            print(_table(summary, variants[0].name))
            if busy := describe_busy(written, "variant"):
                print(f"busy: {busy}; compare again while nothing else runs")
        checks = list(_check_tokens(folder, variants[0], rows))
        if checks:
            write_rows(folder / "comparison_tokens.csv", [asdict(check) for check in checks])
        for said, is_fault in _token_lines(checks, variants[0].name):
            print(f"tokens: {said}")
            faults += [said] if is_fault else []
    print(f"results: {folder}")
    return faults


def _check_tokens(folder: Path, first: Variant, rows: Sequence[Mapping[str, Any]]) -> Iterator[TokenCheck]:
    """Each finished run's tokens against those of the first variant's first finished run; none if there is none."""
    finished = [row for row in rows if row["status"] == "finished"]
    reference = next((row for row in finished if row["variant"] == first.name), None)
    if reference is None:
        return
    expected = _read_tokens(folder, reference)
    for row in finished:
        must_match = first.config.temperature == 0 and row["dtype"] == reference["dtype"] == "float32"
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
    return {int(number): (prompt, made) for number, prompt, made in table[list(TOKEN_COLUMNS)].to_numpy()}


def _token_lines(checks: Sequence[TokenCheck], first: str) -> Iterator[tuple[str, bool]]:
    """What the comparison of tokens says, and whether it is a fault; a variant by its worst run."""
    if not checks:
        yield f"not compared, since no run of {first} finished", False
    elif len(checks) > 1 and not any(each.differ or each.other_prompts for each in checks):
        yield f"the same for all {checks[0].requests} requests in every run", False
    by_differences = sorted(checks, key=lambda each: (each.other_prompts, each.differ))
    for variant, worst in {each.variant: each for each in by_differences}.items():
        if worst.other_prompts:
            yield f"{variant} was asked {worst.other_prompts} other prompts than {first}", True
        if worst.differ:
            where = "" if worst.first_difference is None else f", first at token {worst.first_difference:.0f} (median)"
            why = "" if worst.must_match else "; rounding may do so below float32, and so may sampling"
            line = f"{variant} differs from {first} in {worst.differ} of {worst.requests} requests{where}{why}"
            yield line, worst.must_match


def _table(summary: Sequence[SummaryRow], first: str) -> str:
    lines = [("", "", "median (least to greatest)", f"over {first}", "")]
    for metric, of in itertools.groupby(summary, key=lambda row: row.metric):
        for number, row in enumerate(of):
            values = _range(row.median, row.least, row.greatest)
            ratios = _range(row.ratio_median, row.ratio_least, row.ratio_greatest)
            lines.append(("" if number else metric, row.variant, values, ratios, row.verdict or ""))
    rounds = max(row.rounds for row in summary)
    note = (
        f"better, worse: the 95% interval of the ratio, paired over {rounds} rounds, leaves out 1; equal: it is narrow "
        "about 1; undecided: neither, and more rounds narrow it"
        if rounds > 1
        else "one round says nothing about noise; --repeats 3 or more does"
    )
    return f"{columns(lines)}\n{note}"


def _range(median: float | None, least: float | None, greatest: float | None) -> str:
    if median is None or least is None or greatest is None:
        return "-"
    return _figure(median) if least == greatest else f"{_figure(median)} ({_figure(least)} to {_figure(greatest)})"


def _figure(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"
