"""Reads the results of a GPU check from the folders of its stages, as tables, and keeps them in results/reference.

The folder holds ``check.json`` (how each stage ended, with the machine and the commit) and one folder per stage.
"""

import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd

from splitwiser.errors import InputError, first_line
from splitwiser.placement.layout import parse_layout
from splitwiser.results.paired import round_ratios
from splitwiser.results.schema import METRIC

PROJECT = Path(__file__).resolve().parents[1]
REFERENCE = PROJECT / "results" / "reference"
ARCHIVE, RECORD = "results.tar.gz", "check.json"
PLAN = "plan.json"  # names of a sweep's points in checks from before sweeps had variants
FIGURES = {  # column of throughput.csv: heading, and the divisor from its unit to the heading's
    "output_throughput": ("tokens/s", 1.0),
    "median_ttft_ms": ("TTFT p50 ms", 1.0),
    "p99_ttft_ms": ("TTFT p99 ms", 1.0),
    "median_itl_ms": ("ITL p50 ms", 1.0),
    "p99_itl_ms": ("ITL p99 ms", 1.0),
    "peak_memory_mb": ("memory GB", 1000.0),
}
TOLD = {  # patterns of the findings that the tables show, by probe
    "start": r"context.*",
    "green": r"all splits made",
    "beside": r"32 queues, .*(alone|beside prefill|beside decode)",
    "mps": r"daemon answers|client at \d+%(: context)?",
    "shared_memory": r".*opened",
    "prefill_graphs": r".*tokens, .*",
}
SOFTWARE = {"torch": "pytorch", "transformers": "transformers"}  # the doctor's findings that tell the versions
TEST_COUNTS = ("tests", "failures", "errors", "skipped")
KEPT = (
    RECORD, "*/doctor.json", f"*/{PLAN}", "*/grid.yaml", "*/*.csv", "*/sweep_*/points.csv", "*/sweep_*/capacity.csv",
    "*/compare_*/*.csv", "*/*/compare_*/*.csv",
)  # fmt: skip
KEPT_BYTES = 1 << 20  # largest file that is kept
SHOWN = ("compare-1b", "compare-125m", "compare-7b")  # timelines of the first that exists are kept
PICTURE = "modes.png"
DRAWN = ("output_throughput", "p99_itl_ms")  # of FIGURES, in the picture
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"  # around a generated part of a page
PAGES = {  # the page of each generated part
    "gpu-best": "README.md", "cpu-best": "README.md", "gpu": "docs/benchmarks.md", "cpu": "docs/benchmarks.md",
    "cpu-ahead": "docs/benchmarks.md",
}  # fmt: skip
BASE = "sequential"  # the variant that others' throughput is divided by, round by round
SPEED_UP = "speed-up"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or was cut off."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


def read_rows(path: Path) -> pd.DataFrame:
    """Return a CSV file as a table; empty if it is missing."""
    return pd.read_csv(path) if path.exists() and path.stat().st_size else pd.DataFrame()


def points_path(folder: Path) -> Path:
    """Return the path of the rows of a stage's sweep."""
    return next(iter(sorted(folder.glob("sweep_*/points.csv"))), folder / "points.csv")


def runs_of(folder: Path) -> pd.DataFrame:
    """Return the runs of a stage that is a sweep, with the names of their variants as a column."""
    rows = read_rows(points_path(folder))
    if rows.empty:
        return rows
    numbered = rows[rows["point"].notna()].copy()  # a point that was removed from the grid has no number
    if "variant" not in numbered:
        names = read_json(folder / PLAN).get("variants")
        numbered["variant"] = [
            names[int(row["point"]) - 1] if names else describe(row) for _, row in numbered.iterrows()
        ]
    return numbered


def describe(row: "pd.Series[Any]") -> str:
    """Describe a run by its mode and workers."""
    if row["mode"] not in ("mp", "mps", "green"):
        return str(row["mode"])
    workers = str(row["workers"])
    return f"{row['mode']}, {parse_layout(workers) if workers.startswith('[') else workers}"  # a list if it failed


def comparison(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per variant of ``runs``: its finished rounds, their medians of :data:`FIGURES`, and its throughput over
    that of :data:`BASE`, as the median over the rounds that both finished."""
    if runs.empty:
        return runs
    finished = runs[runs["status"] == "finished"]
    throughput = {
        str(name): own.set_index("round")["output_throughput"] for name, own in finished.groupby("variant", sort=False)
    }
    table = []
    for name in dict.fromkeys(runs["variant"]):
        own = finished[finished["variant"] == name]
        row: dict[str, object] = {"variant": name, "rounds": len(own)}
        for column, (heading, unit) in FIGURES.items():
            row[heading] = own[column].median() / unit if len(own) else None
        ratios = round_ratios(throughput[name], throughput[BASE]) if name in throughput and BASE in throughput else {}
        row[SPEED_UP] = pd.Series(ratios, dtype=float).median()
        table.append(row)
    return pd.DataFrame(table)


def text_table(table: pd.DataFrame) -> list[str]:
    """Return ``table`` as lines of text."""
    return table.to_string(index=False, float_format=number, na_rep="-").splitlines()


def number(value: float) -> str:
    """Format ``value`` with three digits, or all digits before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


# -- the table of a stage, whatever kind it is


def table_of(folder: Path) -> pd.DataFrame:
    """Return the results of a stage from the files in its folder; empty if there are none yet."""
    compared = sorted(folder.glob("compare_*/comparison_tokens.csv"))
    if (folder / "probe.csv").exists():
        return probe_table(folder / "probe.csv")
    if (folder / "doctor.json").exists():
        modes = pd.DataFrame(read_json(folder / "doctor.json").get("modes", []))
        return modes.replace({"works": {True: "yes", False: "no"}})
    if compared:
        tokens = read_rows(compared[-1])[["variant", "requests", "differ", "other_prompts"]]
        return tokens if len(tokens) > 1 else pd.DataFrame()  # a single variant is compared with nothing
    if points_path(folder).exists():
        return comparison(runs_of(folder))
    if reports := sorted(folder.glob("*.xml")):
        return pd.concat([test_counts(path) for path in reports], ignore_index=True)
    if models := sorted(folder.glob("*/compare_*/comparison.csv")):
        tables = {path.parents[1].name: comparison(read_rows(path)) for path in models}
        return pd.concat(tables, names=["model", ""]).reset_index(level="model").reset_index(drop=True)
    return pd.concat([pd.DataFrame(), *map(medians, sorted(folder.glob("*.csv")))], ignore_index=True)


def probe_table(path: Path) -> pd.DataFrame:
    """Return a row for each finding in :data:`TOLD`, and one for the division of the multiprocessors; for a failed probe,
    its error."""
    rows = read_rows(path).fillna("").astype(str).rename(columns={"name": "finding"})
    told: list[tuple[str, ...]] = [
        (probe, finding, f"{value} {unit}".strip())
        for probe, finding, value, unit in rows.itertuples(index=False, name=None)
        if re.fullmatch(TOLD.get(probe, "(?!)"), finding) or (finding == "ended" and value != "ok")
    ]
    shared = rows[(rows["probe"] == "green") & rows["finding"].str.contains("used by both")]
    if len(shared):
        told.append(
            (
                "green",
                "most multiprocessors that both phases used, over all splits",
                str(shared["value"].astype(int).max()),
            )
        )
    return pd.DataFrame(told, columns=["probe", "finding", "value"])


def test_counts(path: Path) -> pd.DataFrame:
    """Return the counts of a JUnit report of pytest as one row."""
    suite = next(ElementTree.parse(path).iter("testsuite")).attrib
    return pd.DataFrame([{"tests of": path.stem} | {name: suite[name] for name in TEST_COUNTS}])


def medians(path: Path) -> pd.DataFrame:
    """Return the medians by mode of a file of examples/long_prompt.py; any other file unchanged."""
    rows = read_rows(path)
    return rows.groupby("mode", sort=False).median().reset_index() if "worst over alone" in rows else rows


def failed_logs(folder: Path) -> list[Path]:
    """Return the logs of a stage's failed runs."""
    logs = []
    comparisons = [*folder.glob("compare_*/comparison.csv"), *folder.glob("*/compare_*/comparison.csv")]
    for table in [*folder.glob("sweep_*/points.csv"), *comparisons]:
        rows = read_rows(table)
        for _, row in rows[rows["status"] == "failed"].iterrows() if len(rows) else ():
            logs.append(table.parent / "logs" / f"round{row['round']}_{row.get('key', row.get('variant'))}.log")
    return [log for log in logs if log.exists()]


# -- where it ran


def machine_line(work: Path) -> str:
    """Return one line with the GPU and the versions that the doctor found, or else the probes."""
    rows = read_rows(work / "probe" / "probe.csv")
    known = {} if rows.empty else dict(zip(rows["name"], rows["value"], strict=True))
    found = {each["name"]: each["figures"] for each in read_json(work / "doctor" / "doctor.json").get("findings", [])}
    known |= {name: found[finding]["version"] for name, finding in SOFTWARE.items() if finding in found}
    if gpus := found.get("driver", {}).get("gpus"):
        known["GPU driver_version"] = gpus[0]["driver_version"]
    gpu = read_json(work / RECORD).get("gpu")
    parts = [("driver", "GPU driver_version"), *((name, name) for name in ("torch", "triton", "transformers"))]
    return ", ".join([str(gpu), *(f"{label} {known[name]}" for label, name in parts if name in known)])


# -- kept for the documentation


def import_archive(archive: Path, name: str | None) -> Path:
    """Unpack what the documentation needs from ``archive`` into the folder ``name`` (default ``gpu-<card>-<date>``) of
    :data:`REFERENCE`, which is replaced. Raises :class:`InputError` if it is not such an archive."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        unpack(archive, work)
        record = read_json(work / RECORD)
        stages = record.get("stages")
        if not stages:
            raise InputError(f"{archive}: has no {RECORD}; give the {ARCHIVE} of a GPU check")
        date = max(what["started"] for what in stages.values())[:10]
        card = re.sub(r"[^a-z0-9]+", "-", str(record["gpu"]).lower().removeprefix("nvidia ")).strip("-")
        folder = REFERENCE / (name or f"gpu-{card}-{date}")
        shutil.rmtree(folder, ignore_errors=True)
        for path in kept_files(work):
            target = folder / path.relative_to(work)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".png":
                shutil.copyfile(path, target)
            else:
                target.write_text(without_folders(path.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
        if len(counts := table_of(work / "tests")):
            (folder / "tests").mkdir(parents=True)
            counts.to_csv(folder / "tests" / "counts.csv", index=False)
    draw(folder)
    return folder


def without_folders(text: str) -> str:
    """Return ``text`` with absolute paths shortened to their last part, since those of another machine are meaningless."""
    return re.sub(r"(?<![\w.:/])/(?!dev/|proc/|sys/)(?:[\w.+-]+/)+", "", text)


def kept_files(work: Path) -> list[Path]:
    """Return the tables and records of all stages, the logs of failures, and the record of each variant's first run; for
    one comparison also the timelines of these."""
    kept = [path for pattern in KEPT for path in work.glob(pattern)]
    kept += [log for folder in work.iterdir() if folder.is_dir() for log in failed_logs(folder)]
    shown = next((name for name in SHOWN if points_path(work / name).exists()), None)
    for folder in work.glob("compare-*"):
        runs = runs_of(folder)
        finished = runs[runs["status"] == "finished"] if len(runs) else runs
        for run_id in finished.groupby("variant", sort=False)["run_id"].first() if len(finished) else ():
            run = points_path(folder).parent / "runs" / run_id
            kept += [run / "run.yaml", *([run / "timeline.png"] if folder.name == shown else [])]
    return [path for path in dict.fromkeys(kept) if path.exists() and 0 < path.stat().st_size <= KEPT_BYTES]


def unpack(archive: Path, work: Path) -> None:
    """Unpack ``archive`` into ``work``. Raises :class:`InputError` if it is not such an archive."""
    try:
        with tarfile.open(archive, "r:gz") as packed:
            packed.extractall(work, filter="data")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{archive}: not an archive of a GPU check ({first_line(error)})") from error


def draw(folder: Path) -> None:
    """Draw throughput and ITL of every comparison in ``folder`` as bars into :data:`PICTURE`; does nothing without one."""
    compared = {path.name: runs_of(path) for path in sorted(folder.glob("compare-*"))}
    tables = [
        (str(next(iter(runs["model"].dropna()), name)), comparison(runs))
        for name, runs in compared.items()
        if len(runs)
    ]
    if not tables:
        return
    from matplotlib.figure import Figure

    heights = [1.2 + 0.3 * len(table) for _, table in tables]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    axes = figure.subplots(len(tables), len(DRAWN), squeeze=False, height_ratios=heights)
    for (model, table), row in zip(tables, axes, strict=True):
        for axis, column in zip(row, DRAWN, strict=True):
            metric, values = METRIC[column], table[FIGURES[column][0]].fillna(0)
            bars = axis.barh(table["variant"], values)
            axis.bar_label(bars, labels=[number(value) for value in values], padding=3)
            axis.invert_yaxis()
            axis.margins(x=0.2)
            axis.locator_params(axis="x", nbins=6)
            axis.xaxis.set_major_formatter("{x:,g}")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{model}: {metric.label}", fontsize=10, loc="left")
            axis.set_xlabel(metric.axis_label)
    figure.savefig(folder / PICTURE, dpi=100)


def newest_reference() -> Path | None:
    """Return the folder of the newest reference check; None if there is none."""
    return max(
        REFERENCE.glob("gpu-*"),
        key=lambda folder: max(what["started"] for what in read_json(folder / RECORD)["stages"].values()),
        default=None,
    )


def commits_of(what: Mapping[str, Any]) -> list[str]:
    """Return the commits that a stage of the record was run with."""
    return str(what["commit"]).split(", ")


def short_commits(stages: Iterable[Mapping[str, Any]]) -> str:
    """Return all commits of ``stages``, shortened."""
    return " and ".join(dict.fromkeys(commit[:12] for what in stages for commit in commits_of(what)))


def sections(folder: Path | None, abouts: Mapping[str, str]) -> dict[str, str]:
    """Return the generated parts of :data:`PAGES` in Markdown, by the names of their marks, from a reference check;
    ``abouts`` describes each stage."""
    if folder is None:
        return dict.fromkeys(("gpu-best", "gpu"), "Not yet measured on a GPU.")
    return {"gpu-best": best(folder, abouts), "gpu": tables(folder, abouts)}


def best(folder: Path, abouts: Mapping[str, str]) -> str:
    """Return the best placements of each comparison, and the picture of all."""
    place = f"results/reference/{folder.name}"
    lines = []
    for path in sorted(folder.glob("compare-*")):
        rows = comparison(runs_of(path)).dropna().to_dict("records")
        base = next((row for row in rows if row["variant"] == BASE), None)
        if base is None or len(rows) < 2:
            continue
        fastest, steadiest = max(rows, key=_figure("tokens/s")), min(rows, key=_figure("ITL p99 ms"))
        rounds = min(row["rounds"] for row in rows)
        lines.append(
            f"- {abouts.get(path.name, path.name)} ({rounds} round{'s' * (rounds > 1)}): "
            f"most tokens/s with *{fastest['variant']}*, {number(fastest[SPEED_UP])} times those of `{BASE}`; "
            f"least ITL p99 with *{steadiest['variant']}*, {number(steadiest['ITL p99 ms'])} ms against "
            f"{number(base['ITL p99 ms'])} ms."
        )
    picture = f"![Throughput and time between tokens by mode on a GPU]({place}/{PICTURE})"
    return "\n\n".join([picture, f"*Measured: {machine_line(folder)}.*", "\n".join(lines)])


def _figure(column: str) -> Callable[[Mapping[Hashable, Any]], float]:
    return lambda row: float(row[column])


def tables(folder: Path, abouts: Mapping[str, str]) -> str:
    """Return the results of every stage with its command."""
    place = f"results/reference/{folder.name}"
    stages = {name: what for name, what in read_json(folder / RECORD)["stages"].items() if len(table_of(folder / name))}
    dates = sorted({what["started"][:10] for what in stages.values()})
    blocks = [
        f"{machine_line(folder)}; {' and '.join(dates)}; commit {short_commits(stages.values())}. "
        f"Rows in [{place}](../{place}). "
        f"Figures are medians over the rounds; one round does not show how much they scatter. {SPEED_UP.capitalize()} is "
        f"tokens/s over those of `{BASE}`, round by round."
    ]
    for name, what in sorted(stages.items(), key=lambda stage: stage[0] == "probe"):  # which is long, and folded
        ended = "" if what["ended"] == "passed" else f" ({what['ended']})"
        blocks += [f"**{name}**{ended}: {abouts.get(name, '')}", f"```bash\n{what['command']}\n```"]
        table = markdown(table_of(folder / name))
        blocks += (
            ["<details markdown><summary>what was found</summary>", table, "</details>"] if name == "probe" else [table]
        )
    return "\n\n".join(blocks)


def markdown(table: pd.DataFrame) -> str:
    """Return ``table`` in Markdown."""
    rows = [[str(name) for name in table.columns], ["---"] * len(table.columns)]
    rows += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(value: object) -> str:
    """Return a value as text that cannot end its table cell."""
    if isinstance(value, float):
        return "-" if pd.isna(value) else number(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def write_sections(project: Path, parts: Mapping[str, str]) -> None:
    """Write each of ``parts`` between its marks in its page of ``project``. Raises :class:`InputError` if marks are
    missing."""
    for name, text in parts.items():
        page = project / PAGES[name]
        first, last = BEGIN.format(name), END.format(name)
        before, begin, rest = page.read_text(encoding="utf-8").partition(first)
        _, end, after = rest.partition(last)
        if not begin or not end:
            raise InputError(f"{page}: has no {first} and {last} for the tables to stand between")
        page.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")
