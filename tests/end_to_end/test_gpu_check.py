"""The check of a GPU: its stages, limits, archive, summary and tables, with stages that need none."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpu_check
import gpu_probe
import gpu_results
import pandas as pd
import pytest
from gpu_check import Check, Stage

from splitwiser.placement.modes import MODES
from splitwiser.study.sweep import Sweep, read_sweep
from tests.support.assertions import assert_says, refusal
from tests.support.commands import invoke
from tests.support.cuda_driver import put_cuda_driver
from tests.support.processes import wait_for

PROJECT = Path(__file__).resolve().parents[2]
SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]


def stage(*commands: list[str], limit_s: int = 60) -> Stage:
    return Stage(limit_s, "for a test", lambda _: iter(commands))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(tmp_path: Path, stages: dict[str, Stage], **options: Any) -> list[str]:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return gpu_check.run_stages(stages, Check(work, options.pop("quick", False)), tmp_path / "out", **options)


def packed(tmp_path: Path) -> dict[str, bytes]:
    with tarfile.open(tmp_path / "out" / gpu_results.ARCHIVE) as archive:
        return {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]


def ended(tmp_path: Path) -> dict[str, str]:
    stages = json.loads(packed(tmp_path)[gpu_results.RECORD])["stages"]
    return {name: what["ended"] for name, what in stages.items()}


# -- the command


def test_help_names_every_stage_with_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        gpu_check.main(["--help"])
    assert left.value.code == 0
    shown = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    missing = [name for name, each in gpu_check.STAGES.items() if [name, str(each.limit_s), "s"] not in shown]
    assert not missing


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["dokter"], ["unknown stage 'dokter'", "doctor"]),
        ([], ["name the stages", "--help"]),
        (["doctor", "--seconds", "0"], ["--seconds must be more than 0"]),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert_says(line, *parts)


def test_limits_fit_into_the_calls_that_a_machine_is_lent_for() -> None:
    limits = {name: each.limit_s for name, each in gpu_check.STAGES.items()}
    assert limits["probe"] + limits["doctor"] + limits["tokens"] < 3 * 60 - 5  # which the check's own start may take
    assert max(limits.values()) < 4 * 60


# -- stages


def test_a_failed_test_is_printed_as_it_fails(tmp_path: Path) -> None:
    tests = "def test_first():\n    assert 1 == 2\n\ndef test_second():\n    import os; os._exit(3)\n"
    (tmp_path / "test_two.py").write_text(tests)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "failures_at_once", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(PROJECT / "scripts")}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3  # cut before any summary
    assert_says(done.stdout, "FAILED", "::test_first", "assert 1 == 2")


def test_stage_that_fails_or_is_cut_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "STOP_S", 0.5)
    stages = {
        "fails": stage(python("print('why'); raise SystemExit(3)")),
        "late": stage(SLEEPS),
        "works": stage(python("print('done')")),
    }
    assert run(tmp_path, stages, seconds=2) == ["fails", "late"]
    assert ended(tmp_path) == {"fails": "failed: exit code 3", "late": "cut", "works": "passed"}
    assert b"why" in packed(tmp_path)["fails/log.txt"]


def test_stage_whose_commands_cannot_be_made_has_failed(tmp_path: Path) -> None:
    def _not_there() -> list[list[str]]:
        raise ValueError("no capacity")

    def commands(_: Check) -> Iterator[list[str]]:
        yield from _not_there()

    assert run(tmp_path, {"wrong": Stage(60, "", commands), "works": stage(python(""))}) == ["wrong"]
    assert ended(tmp_path)["wrong"] == "failed: ValueError: no capacity"


def test_stage_without_what_it_needs_is_skipped_with_the_reason_and_is_no_failure(tmp_path: Path) -> None:
    write_doctor(tmp_path / "work", *MODES, vllm=(None, "no Python environment at .venv-vllm"))
    assert run(tmp_path, {name: gpu_check.STAGES[name] for name in ("vllm-tokens", "vllm")}) == []
    assert set(ended(tmp_path).values()) == {"skipped: no Python environment at .venv-vllm"}
    assert "vllm: skipped: no Python" in " ".join(gpu_check.summarise(Check(tmp_path / "work"), ["vllm"]))


def test_command_of_a_stage_runs_though_the_one_before_failed(tmp_path: Path) -> None:
    run(tmp_path, {"two": stage(python("raise SystemExit(1)"), python("print('second')"))})
    assert ended(tmp_path) == {"two": "failed: exit code 1"}
    assert b"\nsecond\n" in packed(tmp_path)["two/log.txt"]


def test_stage_is_first_interrupted_so_that_it_writes_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "STOP_S", 10.0)
    writes = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what it has')"
    began = time.monotonic()
    run(tmp_path, {"writes": stage(python(writes))}, seconds=11.5)
    assert time.monotonic() - began < 9
    assert packed(tmp_path)["writes/log.txt"].endswith(b"what it has\n")
    assert ended(tmp_path) == {"writes": "cut"}


def test_nothing_of_a_stage_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "STOP_S", 0.2)
    pid = tmp_path / "pid"
    # a session of its own, deaf to signals: only SIGKILL by its id ends it
    inner = f"trap '' INT TERM; echo $$ >{shlex.quote(str(pid))}; sleep 60; :"
    deaf = f"trap '' INT TERM; setsid sh -c {shlex.quote(inner)} & sleep 60; :"
    run(tmp_path, {"deaf": stage(["sh", "-c", deaf])}, seconds=2)
    number = int(pid.read_text())
    wait_for(lambda: not alive(number), f"end of process {number}")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_sigterm_ends_the_call_with_its_archive_and_summary(tmp_path: Path) -> None:
    code = (
        "import sys, gpu_check\n"
        "def commands(_):\n"
        "    yield [sys.executable, '-c', \"import time; print('begun', flush=True); time.sleep(60)\"]\n"
        "gpu_check.STAGES = {'long': gpu_check.Stage(60, 'for a test', commands)}\n"
        f"sys.exit(gpu_check.main(['long', '--results', {str(tmp_path / 'out')!r}, '--work', {str(tmp_path / 'work')!r}]))"
    )
    path = os.pathsep.join([str(PROJECT / "scripts"), str(PROJECT / "src")])
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE
    ) as process:
        log = tmp_path / "work" / "long" / "log.txt"
        wait_for(lambda: log.exists() and b"begun\n" in log.read_bytes(), "begin of the stage")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate()
    assert process.returncode == 130
    assert b"long: interrupted" in said
    assert ended(tmp_path) == {"long": "interrupted"}


# -- the archive


def test_archive_is_whole_after_each_stage(tmp_path: Path) -> None:
    seen = []

    def looks(_: Check) -> Iterator[list[str]]:
        seen.append(sorted(packed(tmp_path)))
        yield python("print('second')")

    run(tmp_path, {"first": stage(python("print('first')")), "second": Stage(60, "", looks)})
    assert seen == [["check.json", "first/log.txt"]]
    assert sorted(packed(tmp_path)) == ["check.json", "first/log.txt", "second/log.txt"]


def test_archive_is_renewed_while_a_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "PACK_S", 0.2)
    log = tmp_path / "work" / "long" / "log.txt"
    copied = tmp_path / "copied"
    archive = tmp_path / "out" / gpu_results.ARCHIVE
    copies = python(
        f"import pathlib, shutil, time\nprint('begun', flush=True)\nwhile not pathlib.Path({str(archive)!r}).exists(): "
        f"time.sleep(0.05)\nshutil.copy({str(archive)!r}, {str(copied)!r})"
    )
    run(tmp_path, {"long": stage(copies)})
    with tarfile.open(copied) as early:
        assert "long/log.txt" in early.getnames()
    assert log.exists()


def test_largest_files_are_left_out_and_named_where_the_archive_would_be_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "ARCHIVE_BYTES", 600_000)
    work = tmp_path / "work" / "stage"
    work.mkdir(parents=True)
    for name, size in {"small": 1000, "medium": 200_000, "large": 400_000}.items():
        (work / name).write_bytes(os.urandom(size))
    gpu_check.pack(work.parent, tmp_path / "out")
    assert sorted(packed(tmp_path)) == ["left_out.txt", "stage/medium", "stage/small"]
    assert packed(tmp_path)["left_out.txt"] == b"stage/large\n"
    assert (tmp_path / "out" / gpu_results.ARCHIVE).stat().st_size < 600_000


def test_a_checkpoint_is_not_packed_for_a_later_call_would_find_it_in_part(tmp_path: Path) -> None:
    checkpoint = tmp_path / "work" / "peers" / "compare_opt" / "models" / "opt-125m"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint.parents[1] / "comparison.csv").write_text("rows")
    gpu_check.pack(tmp_path / "work", tmp_path / "out")
    assert sorted(packed(tmp_path)) == ["peers/compare_opt/comparison.csv"]


def test_later_call_skips_what_has_passed_and_tries_the_rest_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = python(f"open({str(tmp_path / 'runs')!r}, 'a').write('x')")
    fails = python(f"open({str(tmp_path / 'tries')!r}, 'a').write('x'); raise SystemExit(1)")
    monkeypatch.setattr(gpu_check, "STAGES", {"good": stage(count), "bad": stage(fails)})
    for call in ([], ["--again"]):
        for out in ("out", "fresh"):  # the second on a fresh machine, from the archive alone
            resume = ["--resume", str(tmp_path / "out" / gpu_results.ARCHIVE)] if out == "fresh" else []
            assert gpu_check.main(["good", "bad", *call, *resume, "--results", str(tmp_path / out)]) == 1
    assert (
        tmp_path / "runs"
    ).read_text() == "x" * 3  # once, not at all twice over, and each time it was asked for anew
    assert (tmp_path / "tries").read_text() == "x" * 4


def test_the_gpu_is_named_by_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_cuda_driver(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert gpu_check.find_gpu() == "Tesla V100"


def test_what_was_measured_on_another_gpu_is_not_gone_on_from(tmp_path: Path) -> None:
    record = gpu_check.Record(tmp_path)
    record.set_gpu("NVIDIA H100 80GB HBM3")
    record.add("probe", ended="passed")
    assert_says(
        refusal(gpu_check.Record(tmp_path).set_gpu, "NVIDIA H200"), "NVIDIA H100 80GB HBM3", "this is NVIDIA H200"
    )


def test_stage_that_goes_on_names_every_commit_that_it_ran_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit, again, named in (
        ("abc", False, "abc"),
        ("abc", False, "abc"),
        ("def", False, "abc, def"),
        ("def", True, "def"),
    ):
        monkeypatch.setenv("SPLITWISER_COMMIT", commit)
        run(tmp_path, {"fails": stage(python("raise SystemExit(1)"))}, again=again)
        assert json.loads(packed(tmp_path)["check.json"])["stages"]["fails"]["commit"] == named


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no archive", encoding="utf-8")
    assert_says(refusal(gpu_results.unpack, tmp_path / "file", tmp_path / "work"), "not an archive of a GPU check")


# -- the summary


def test_summary_has_at_most_100_lines_with_the_ends_of_failed_logs(tmp_path: Path) -> None:
    names = [f"stage{number}" for number in range(12)]
    for name in names:
        write_points(tmp_path / name, [("sequential", number, 10.0) for number in range(1, 30)])
        (tmp_path / name / "log.txt").write_text(
            "\n".join(f"line {n} {'x' * 200}" for n in range(50)), encoding="utf-8"
        )
    record = gpu_check.Record(tmp_path)
    for name in names:
        record.add(name, ended="failed: exit code 1", seconds=1, started="2026-01-01T00:00:00+00:00", commit="abc")
    lines = gpu_check.summarise(Check(tmp_path), names)
    assert len(lines) == 100
    assert len("\n".join(lines)) < 12_000
    assert any(line.startswith("  line 49 x") for line in lines)


def test_summary_has_what_the_probes_found(tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    rows = [
        ("mps", "daemon answers", "0.38", "s"), ("mps", "ended", "ok", ""),
        ("green", "split 66/66: used by both", "9", "multiprocessors"),
        ("green", "split 88/44: used by both", "12", "multiprocessors"),
        ("kernels", "ended", "failed: RuntimeError: no kernel", ""),
    ]  # fmt: skip
    pd.DataFrame(rows, columns=["probe", "name", "value", "unit"]).to_csv(tmp_path / "probe" / "probe.csv", index=False)
    gpu_check.Record(tmp_path).add(
        "probe", ended="failed: exit code 1", seconds=1, started="2026-01-01T00:00:00+00:00", commit="abc"
    )
    text = " ".join("\n".join(gpu_check.summarise(Check(tmp_path), ["probe"])).split())
    assert_says(
        text,
        "mps daemon answers 0.38 s",
        "kernels ended failed: RuntimeError: no kernel",
        "green most multiprocessors that both phases used, over all splits 12",
    )


def test_summary_shows_why_a_run_of_a_comparison_failed(tmp_path: Path) -> None:
    write_points(tmp_path / "compare-1b", [("sequential", 1, 10.0), ("mp", 1, None)])
    log = tmp_path / "compare-1b" / "sweep_compare-1b" / "logs" / "round1_key-mp.log"
    log.parent.mkdir()
    log.write_text("50%|#####\nsplitwiser: out of memory\n", encoding="utf-8")
    gpu_check.Record(tmp_path).add(
        "compare-1b", ended="failed: exit code 1", seconds=1, started="2026-01-01T00:00:00+00:00", commit="abc"
    )
    assert "  splitwiser: out of memory" in gpu_check.summarise(Check(tmp_path), ["compare-1b"])


# -- comparisons


def write_points(folder: Path, runs: list[tuple[str, int, float | None]]) -> None:
    """A sweep's rows: variant, round and output throughput, None for a run that failed."""
    names = list(dict.fromkeys(name for name, _, _ in runs))
    rows = [
        {"point": names.index(name) + 1, "round": number, "key": f"key-{name}", "variant": name, "mode": name,
         "model": "llama", "status": "finished" if value else "failed", "run_id": f"{name}-{number}",
         "request_throughput": value, **dict.fromkeys(gpu_results.FIGURES, value)}
        for name, number, value in runs
    ]  # fmt: skip
    sweep = folder / f"sweep_{folder.name}"
    sweep.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(sweep / "points.csv", index=False)


def write_doctor(work: Path, *modes: str, vllm: tuple[bool | None, str] = (True, "0.32.0")) -> None:
    found = [{"mode": mode, "works": mode in modes, "note": ""} for mode in MODES]
    findings: list[dict[str, Any]] = [{"name": "vllm", "ok": vllm[0], "text": vllm[1], "figures": {}}]
    (work / "doctor").mkdir(parents=True, exist_ok=True)
    (work / "doctor" / "doctor.json").write_text(json.dumps({"modes": found, "findings": findings}), encoding="utf-8")


def sweep_of(work: Path, name: str) -> Sweep:
    """The sweep that a stage runs."""
    (command,) = gpu_check.STAGES[name].commands(Check(work))
    assert command[3:] == ["sweep", str(work / name / "grid.yaml"), "--results", str(work / name)]
    return read_sweep(work / name / "grid.yaml")


def variants_of(grid: Sweep) -> list[str]:
    return [point.varied["variant"] for point in grid.points]


def test_comparison_has_the_variants_that_work_with_the_base_first(tmp_path: Path) -> None:
    write_doctor(tmp_path, "generate", "sequential", "mp")
    assert variants_of(sweep_of(tmp_path, "compare-1b")) == [
        "sequential",
        "mp",
        "generate",
        "sequential, steps of 8192",
        "two mixed, mp",
        "sequential, chunks of 512",
    ]
    write_doctor(tmp_path, *MODES)
    every = read_sweep(gpu_check.SWEEPS / "gpu.yaml")
    assert variants_of(sweep_of(tmp_path, "compare-1b")) == variants_of(every)
    assert every.points[0].config.mode == gpu_results.BASE


def test_paper_has_the_points_whose_modes_work(tmp_path: Path) -> None:
    write_doctor(tmp_path, "sequential", "mp")
    assert {point.config.mode for point in sweep_of(tmp_path, "paper").points} == {"sequential", "mp"}


def test_engines_of_vllm_are_placed_under_mps_where_it_works(tmp_path: Path) -> None:
    for modes, others in ((("sequential", "mp"), "mp"), (tuple(MODES), "mps")):
        write_doctor(tmp_path, *modes)
        (command,) = gpu_check.STAGES["vllm-tokens"].commands(Check(tmp_path))
        variants = [shlex.split(after) for before, after in pairwise(command) if before == "--variant"]
        assert [each[0] for each in variants] == ["vllm-one:", "vllm-two:", "vllm-split:"]
        assert [each[each.index("--mode") + 1] for each in variants[1:]] == [others, others]
    placed = sweep_of(tmp_path, "vllm").points
    assert [point.config.mode for point in placed] == ["sequential", "sequential", "mps", "mps", "mp"]
    assert [point.config.backend for point in placed] == ["hf", *["vllm"] * 4]


def test_doctor_comes_first_where_it_has_not_spoken(tmp_path: Path) -> None:
    first = next(gpu_check.STAGES["compare-1b"].commands(Check(tmp_path)))
    assert first[-2:] == ["doctor", "--json"]


def test_arrivals_are_at_a_load_with_more_requests_and_without_generate(tmp_path: Path) -> None:
    write_doctor(tmp_path, "generate", "sequential", "mp")
    at_once, arriving = sweep_of(tmp_path, "compare-1b"), sweep_of(tmp_path, "compare-1b-60")
    assert (at_once.load, arriving.load) == (None, 0.6)
    assert [grid.points[0].config.requests for grid in (at_once, arriving)] == [128, 256]
    assert variants_of(arriving) == [name for name in variants_of(at_once) if name != "generate"]


def test_table_has_medians_and_ratios_round_by_round(tmp_path: Path) -> None:
    write_points(
        tmp_path / "compare-1b",
        [("sequential", 1, 10.0), ("sequential", 2, 40.0), ("mp", 1, 20.0), ("mp", 2, 40.0), ("mps", 1, None)],
    )
    table = gpu_results.table_of(tmp_path / "compare-1b").set_index("variant")
    assert list(table["rounds"]) == [2, 2, 0]
    assert list(table["tokens/s"])[:2] == [25, 30]
    assert list(table[gpu_results.SPEED_UP])[:2] == [1, 1.5]
    assert table.loc["mps"].drop("rounds").isna().all()


def test_table_of_peers_names_the_models(tmp_path: Path) -> None:
    for model, throughput in (("opt-125m", 20.0), ("llama-3.2-1b", 5.0)):
        folder = tmp_path / "peers" / model / f"compare_{model}_standard"
        folder.mkdir(parents=True)
        names = {"sequential": 10.0, "hf-continuous": throughput}
        rows = [
            {"round": 1, "variant": name, "status": "finished", **dict.fromkeys(gpu_results.FIGURES, value)}
            for name, value in names.items()
        ]
        pd.DataFrame(rows).to_csv(folder / "comparison.csv", index=False)
    table = gpu_results.table_of(tmp_path / "peers")
    assert table[["model", "variant", gpu_results.SPEED_UP]].values.tolist() == [
        ["llama-3.2-1b", "sequential", 1.0], ["llama-3.2-1b", "hf-continuous", 0.5],
        ["opt-125m", "sequential", 1.0], ["opt-125m", "hf-continuous", 2.0],
    ]  # fmt: skip


# -- the probes


def test_probe_gives_a_row_a_finding_and_is_not_run_again(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(PROJECT / "scripts" / "gpu_probe.py"),
        "machine",
        "--out",
        str(tmp_path / "probe.csv"),
    ]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    rows = pd.read_csv(tmp_path / "probe.csv").set_index("name")["value"]
    assert rows["cores"] == str(len(os.sched_getaffinity(0)))
    assert f"  cores: {rows['cores']}" in first
    assert rows["ended"] == "ok"
    assert second == ""


def test_probe_that_does_not_end_is_ended_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_probe, "DEADLINE_S", 0.2)
    out = tmp_path / "probe.csv"
    gpu_probe.keep_finished(out)
    assert gpu_probe.run_apart("start", out) == "failed: no end within 0 s"
    assert pd.read_csv(out)["value"].iloc[-1] == "failed: no end within 0 s"


# -- what is kept


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Of a check with a comparison one of whose variants failed."""
    work = tmp_path / "work"
    write_doctor(work, "sequential", "mp")
    write_points(
        work / "compare-1b", [("sequential", 1, 10.0), ("sequential", 2, 10.0), ("mp", 1, 20.0), ("mps", 1, None)]
    )
    sweep = work / "compare-1b" / "sweep_compare-1b"
    for run in ("sequential-1", "sequential-2", "mp-1"):
        (sweep / "runs" / run).mkdir(parents=True)
        for name in ("run.yaml", "timeline.png", "steps.csv"):
            (sweep / "runs" / run / name).write_text(name, encoding="utf-8")
    (sweep / "logs").mkdir()
    for variant in ("sequential", "mps"):
        (sweep / "logs" / f"round1_key-{variant}.log").write_text("said", encoding="utf-8")
    (work / "tests").mkdir()
    counts = '<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2" hostname="here"/></testsuites>'
    (work / "tests" / "kernel.xml").write_text(counts, encoding="utf-8")
    record = gpu_check.Record(work)
    record.set_gpu("NVIDIA H100 80GB HBM3")
    for name in ("doctor", "compare-1b", "tests"):
        record.add(
            name, ended="passed", seconds=1, started="2026-01-02T00:00:00+00:00", commit="abcdef0123456789",
            command=f"scripts/gpu_check.sh {name}",
        )  # fmt: skip
    gpu_check.pack(work, tmp_path / "out")
    return tmp_path / "out" / gpu_results.ARCHIVE


def test_import_keeps_what_the_pages_need(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_results, "REFERENCE", tmp_path / "reference")
    folder = gpu_results.import_archive(archive, None)
    assert folder == tmp_path / "reference" / "gpu-h100-80gb-hbm3-2026-01-02"
    sweep = "compare-1b/sweep_compare-1b"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "check.json", f"{sweep}/logs/round1_key-mps.log", f"{sweep}/points.csv",
        f"{sweep}/runs/mp-1/run.yaml", f"{sweep}/runs/mp-1/timeline.png", f"{sweep}/runs/sequential-1/run.yaml",
        f"{sweep}/runs/sequential-1/timeline.png", "doctor/doctor.json", "modes.png", "tests/counts.csv",
    ]  # fmt: skip


def test_import_writes_the_tables_into_their_pages(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_results, "REFERENCE", tmp_path / "results" / "reference")
    monkeypatch.setattr(gpu_check, "PROJECT", tmp_path)
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    readme.write_text("<!-- gpu-best: begin -->\n<!-- gpu-best: end -->\nafter\n", encoding="utf-8")
    page.write_text("before\n<!-- gpu: begin -->\nold\n<!-- gpu: end -->\nafter\n", encoding="utf-8")
    assert gpu_check.main(["--import", str(archive), "--as", "gpu-mine"]) == 0
    best, text = readme.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    assert "before\n<!-- gpu: begin -->\nNVIDIA H100 80GB HBM3; 2026-01-02; commit abcdef012345." in text
    assert text.endswith("|\n<!-- gpu: end -->\nafter\n")
    assert "results/reference/gpu-mine/modes.png" in best
    assert "```bash\nscripts/gpu_check.sh compare-1b\n```" in text
    assert "| mp | 1 | 20.0 |" in text
    assert "most tokens/s with *mp*, 2.00 times those of `sequential`; least ITL p99 with *sequential*" in best
    assert "| mps | 0 | - |" in text
    assert "| kernel | 5 | 1 | 0 | 2 |" in text


def test_folders_of_the_machine_are_not_kept() -> None:
    text = 'File "/home/me/project/src/a.py", 40/60, https://x.org/a/b, no /dev/nvidiactl, results: /tmp/check/runs'
    kept = 'File "a.py", 40/60, https://x.org/a/b, no /dev/nvidiactl, results: runs'
    assert gpu_results.without_folders(text) == kept


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("text", encoding="utf-8")
    message = refusal(gpu_results.write_sections, tmp_path, {"gpu-best": ""})
    assert_says(message, "README.md: has no <!-- gpu-best: begin -->")


def test_pages_have_the_tables_of_the_newest_check() -> None:
    made = gpu_results.sections(
        gpu_results.newest_reference(), {name: each.about for name, each in gpu_check.STAGES.items()}
    )
    for name, part in made.items():
        text = (PROJECT / gpu_results.PAGES[name]).read_text(encoding="utf-8")
        begin, end = gpu_results.BEGIN.format(name), gpu_results.END.format(name)
        assert text.partition(begin)[2].partition(end)[0] == f"\n{part}\n"


# -- all of it


@pytest.mark.usefixtures("runs_here")
@pytest.mark.parametrize(("stage", "requests"), [("tokens", "2"), ("tokens-adapters", "12")])
def test_the_tokens_of_two_modes_are_compared_and_summed_up(
    stage: str, requests: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)

    def run_here(command: Sequence[str], log: Path, *_: object) -> str:
        assert list(command[:3]) == gpu_check.splitwiser()
        done = invoke(*command[3:])
        log.write_text(done.stdout + done.stderr)
        return "passed" if done.returncode == 0 else "failed"

    monkeypatch.setattr(gpu_check, "run_command", run_here)
    check = Check(tmp_path / "work", quick=True)
    works = {"modes": [{"mode": mode, "works": mode != "mps"} for mode in MODES]}
    (check.folder("doctor") / "doctor.json").write_text(json.dumps(works))
    assert run(tmp_path, {stage: gpu_check.STAGES[stage]}, quick=True) == []
    shown = [line.split() for line in gpu_check.summarise(check, [stage])]
    assert ["sequential", requests, "0", "0"] in shown  # no other tokens, no other prompts


@pytest.mark.slow
def test_check_runs_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    command = [str(PROJECT / "scripts" / "gpu_check.sh"), "doctor", "--quick", "--seconds", "240"]
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ended(tmp_path) == {"doctor": "passed"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.tar.gz", "summary.txt"]
    assert ["sequential", "yes"] in [line.split() for line in done.stdout.splitlines()]
