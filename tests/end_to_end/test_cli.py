"""The command as a user runs it: real files, and real processes and signals where they make a difference."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import splitwiser as splitwiser_package
from splitwiser.engine import steps
from splitwiser.engine.sampling import Sampled
from splitwiser.engine.steps import Chunk
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.results.schema import GENERATIONS, LATENCY, STEPS, names
from tests.support.commands import COMMAND, invoke, only_run, splitwiser, write_workload

FILES = {
    "latency.csv", "throughput.csv", "steps.csv", "generations.csv", "tokens.csv", "run.yaml", "timeline.png", "trace.json",
}  # fmt: skip


@pytest.mark.parametrize("mode", ["sequential", "generate"])
def test_the_main_job_writes_every_file(mode: str, tmp_path: Path) -> None:
    done = invoke("run", "--mode", mode, "--limit", "6", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    directory = only_run(tmp_path)
    assert directory.name.startswith(f"radiology-opt_case0_{mode}_")
    assert {path.name for path in directory.iterdir()} == FILES
    latency, steps, generations, throughput, runs = (
        pd.read_csv(path)
        for path in (
            directory / "latency.csv", directory / "steps.csv", directory / "generations.csv",
            directory / "throughput.csv", tmp_path / "runs.csv",
        )
    )  # fmt: skip
    assert tuple(latency.columns) == names(LATENCY)
    assert tuple(steps.columns) == names(STEPS)
    assert tuple(generations.columns) == names(GENERATIONS)
    assert sorted(latency.request_id) == sorted(generations.request_id) == list(range(6))
    row = throughput.iloc[0]
    assert (row.completed, row.failed, row.total_output_tokens) == (6, 0, latency.output_tokens.sum())
    assert row.total_input_tokens == latency.prompt_tokens.sum() == steps[steps.phase == "prefill"].tokens.sum()
    assert row.duration == pytest.approx(latency.finish_s.max())
    assert runs.run_id.tolist() == [directory.name]
    assert generations.summary_gen.str.len().min() > 10
    record = yaml.safe_load((directory / "run.yaml").read_text())
    assert record["status"] == "finished"
    assert record["configuration"]["mode"] == mode
    assert record["configuration"]["prefill_tokens"] == 2048
    assert record["versions"]["torch"]
    for shown in ("requests    6 in", "TTFT        p50", "ITL         p50", "E2E         p50", str(directory)):
        assert shown in done.stdout
    assert "6/6 requests" in done.stderr


def test_both_modes_make_the_same_summaries(tmp_path: Path) -> None:
    made = []
    for mode in ("sequential", "generate"):
        done = invoke("run", "--mode", mode, "--case_id", "1", "--limit", "5", "--results", tmp_path / mode)
        assert done.returncode == 0, done.stderr
        table = pd.read_csv(only_run(tmp_path / mode) / "generations.csv").sort_values("request_id")
        made.append(table.summary_gen.tolist())
    assert made[0] == made[1]


def test_models_of_a_file_of_ones_own(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    models = tmp_path / "models.yaml"
    models.write_text(f"mine: {{path: {os.path.relpath(tiny('llama'), tmp_path)}}}")
    listed = invoke("models", "--models", models).stdout.splitlines()[1].split()
    assert listed == ["mine", "0.1M", "0.1", "MiB", "packed", "yes", str(tiny("llama"))]
    done = invoke(
        "run", "--models", models, "--model", "mine", "--prompt_tokens", "5", "--requests", "2", "--output_tokens", "2",
        "--results", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert only_run(tmp_path / "out").name.startswith("mine_synthetic_sequential_")
    done = invoke("run", "--models", models, "--results", tmp_path / "none")
    assert (done.returncode, done.stderr) == (2, "splitwiser: unknown model 'radiology-opt'; known: mine\n")


@pytest.mark.slow
def test_a_comparison_of_a_model_of_a_file_of_ones_own(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    (tmp_path / "models.yaml").write_text(f"mine: {{path: {tiny('llama')}}}")
    done = invoke(
        "compare", "--modes", "sequential,generate", "--repeats", "1", "--models", tmp_path / "models.yaml",
        "--model", "mine", "--prompt_tokens", "5", "--requests", "2", "--output_tokens", "2", "--results", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert only_run(tmp_path / "out").name.startswith("compare_mine_synthetic_")


def test_cases_say_which_of_them_run_with_an_adapter() -> None:
    lines = [line.split(maxsplit=1) for line in invoke("cases").stdout.splitlines()[1:]]
    assert [int(number) for number, said in lines if "the model's own, or --adapter" in said] == [100, 200]


def test_cases_of_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "cases.yaml").write_text("7: {description: own}")
    assert invoke("cases", "--cases", tmp_path / "cases.yaml").stdout.splitlines()[1].split() == ["7", "own"]


def test_a_sweep_may_be_named(tmp_path: Path) -> None:
    done = invoke("sweep", "example", "--list", "--results", tmp_path)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 9), done.stderr
    done = invoke("sweep", "exampel", "--list", "--results", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "splitwiser: sweep exampel: no such file, and unknown name of configs/sweeps 'exampel'; did"
    )


def test_chats_and_requests_with_parameters_of_their_own(tmp_path: Path, chatty: Path) -> None:
    finding = "the lungs are clear. marked pulmonary edema is seen."
    chat = {"messages": [{"role": "user", "content": finding}]}
    workload = tmp_path / "chats.jsonl"
    lines = [
        {"max_tokens": 30},
        chat,
        {**chat, "stop": "edema"},
        {"prompt": f"### findings: {finding} ### impressions:"},
    ]
    workload.write_text("\n".join(map(json.dumps, lines)))
    done = invoke("run", "--model", chatty, "--workload", workload, "--stop", ".", "--results", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "note: stop is as the workload says for 1 of 3 requests" in done.stdout
    rows = pd.read_csv(only_run(tmp_path / "out") / "generations.csv").set_index("request_id")
    assert rows.finding[0] == finding
    assert rows.summary_gen[0] == rows.summary_gen[2]  # the template writes what the third request gives as text
    assert "edema" in rows.summary_gen[0]
    assert "edema" not in rows.summary_gen[1]
    assert "." not in rows.summary_gen[0]


def test_reports_as_chats_need_a_template(tmp_path: Path) -> None:
    done = invoke("run", "--limit", "1", "--chat_template", "--results", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "request 0: radiology-opt has no chat template" in done.stderr


def test_a_workload_of_token_ids_needs_no_tokenizer(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    workload = write_workload(tmp_path / "short.json", [[5, 6], [7]], arrival_s=[0.0, 0.2])
    done = invoke(
        "run", "--model", tiny("llama"), "--workload", workload, "--ignore-eos", "--results", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    latency = pd.read_csv(only_run(tmp_path / "out") / "latency.csv").sort_values("request_id")
    assert latency.output_tokens.tolist() == [4, 4]
    assert latency.arrival_s.tolist() == [0.0, 0.2]
    assert latency.prefill_start_s[1] >= 0.2


@pytest.mark.parametrize(
    ("policy", "order", "noted"), [("priority:ageing_s=60", [2, 0, 1], False), ("fcfs", [0, 1, 2], True)]
)
def test_requests_with_priorities(
    policy: str, order: list[int], noted: bool, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    prompts = [{"prompt": [5] * 9, "priority": priority} for priority in (1, 2, -1)]
    workload = write_workload(tmp_path / "urgent.json", prompts)
    done = invoke(
        "run", "--model", tiny("llama"), "--workload", workload, "--ignore_eos", "--max_batch", "1", "--policy", policy,
        "--prefix_caching", "--results", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("note: priority of the requests changes nothing: it is for --policy priority" in done.stdout) == noted
    directory = only_run(tmp_path / "out")
    latency = pd.read_csv(directory / "latency.csv").sort_values("first_token_s")
    assert latency.request_id.tolist() == order
    assert latency.sort_values("request_id").priority.tolist() == [1, 2, -1]
    record = yaml.safe_load((directory / "run.yaml").read_text())
    assert record["configuration"]["policy"] == policy.replace("fcfs", "first_come")
    assert record["policy"].get("ageing_s") == (None if noted else 60)
    assert record["schedule"] == {"class": "splitwiser.engine.schedule:Alternate"}
    assert (record["kv_pool"]["reserve"], record["kv_pool"]["prefix_caching"]) == (False, True)


@pytest.mark.parametrize("mode", ["sequential", "generate"])
def test_a_trace_is_replayed_with_goodput(mode: str, tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    trace = tmp_path / "conv.csv"
    rows = ["2023-11-16 18:15:00.0,9,3", "2023-11-16 18:15:01.0,300,6", "2023-11-16 18:15:02.0,20,2"]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    done = invoke(
        "run", "--model", tiny("llama"), "--mode", mode, "--trace", trace, "--trace_slice", "0.5:", "--trace_speed", "10",
        "--max_prompt_tokens", "30", "--goodput", "ttft:60000,e2el:60000", "--results", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: 1 of 2 requests are cut to 30 prompt tokens" in done.stdout + done.stderr
    latency = pd.read_csv(only_run(tmp_path / "out") / "latency.csv").sort_values("request_id")
    assert latency.prompt_tokens.tolist() == [30, 20]
    assert latency.output_tokens.tolist() == [6, 2]
    assert latency.arrival_s.tolist() == pytest.approx([0.05, 0.15])
    row = pd.read_csv(only_run(tmp_path / "out") / "throughput.csv").iloc[0]
    assert row.request_goodput == row.request_throughput > 0
    assert "requests/s meet every target" in done.stdout


def test_a_closed_loop_with_synthetic_lengths(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    done = invoke(
        "run", "--model", tiny("llama"), "--prompt_tokens", "uniform:5:20", "--output_tokens", "4", "--requests", "7",
        "--max_concurrency", "2", "--results", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    directory = only_run(tmp_path / "out")
    latency = pd.read_csv(directory / "latency.csv").sort_values("request_id")
    assert latency.arrival_s.tolist()[:2] == [0, 0]
    assert set(latency.arrival_s[2:]) <= set(latency.finish_s)
    assert latency.output_tokens.tolist() == [4] * 7
    row = pd.read_csv(directory / "throughput.csv").iloc[0]
    assert (row.max_concurrency, row.completed) == (2, 7)
    record = yaml.safe_load((directory / "run.yaml").read_text())
    assert record["requests"]["source"] == "synthetic"
    assert record["requests"]["prompt_tokens"]["mean"] == pytest.approx(latency.prompt_tokens.mean())


@pytest.mark.parametrize("installed", [True, False])
def test_texts_are_scored_where_the_library_is_there(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "rouge_score", None)
    done = invoke("run", "--limit", "3", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    row = pd.read_csv(only_run(tmp_path) / "throughput.csv").iloc[0]
    assert ("ROUGE-L" in done.stdout) is installed
    assert ("rouge-score is not installed" in done.stdout + done.stderr) is not installed
    assert (row.rougeL > 0.9) if installed else pd.isna(row.rougeL)


def test_options_are_shown_in_groups_in_one_spelling() -> None:
    shown = invoke("run", "--help").stdout
    for heading in ("requests:", "arrivals:", "model and placement:", "sampling:", "results:"):
        assert f"\n{heading}\n" in shown
    assert "--request_rate REQUEST_RATE" in shown
    assert "--request-rate" not in shown
    assert "default: None" not in shown
    assert "--lend, --no-lend" in shown


def broken_data(tmp_path: Path) -> dict[str, tuple[list[str | Path], str]]:
    """Arguments that are wrong, and what the one line must say."""
    short = tmp_path / "short"
    short.mkdir()
    (short / "test.findings.tok").write_text("a\nb\n")
    (short / "test.impression.tok").write_text("a\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    for part in ("findings", "impression"):
        (empty / f"test.{part}.tok").write_text("")
    bare = tmp_path / "bare"
    bare.mkdir()
    long = write_workload(tmp_path / "long.json", [[5] * 3000])
    large = write_workload(tmp_path / "large.json", [[5] * 500])
    return {
        "missing file": (["--data", tmp_path / "none.csv"], "none.csv: no such file"),
        "line counts": (["--data", short], "test.findings.tok has 2 lines but test.impression.tok has 1"),
        "empty data": (["--data", empty], "no reports in it"),
        "long prompt": (["--workload", long], "request 0: 3000 prompt tokens and 4 new ones need 3003 positions"),
        "large request": (["--workload", large, "--kv_memory", "1MiB"], "in the KV pool, which holds"),
        "unknown case": (["--case_id", "3"], "unknown case '3'; known: 0, 1, 2, 4, 5, 100, 200"),
        "no adapter": (["--case_id", "200", "--model", "opt-125m"], "case 200 (LoRA) needs an adapter of that kind"),
        "no config": (["--model", bare], "no config.json in it"),
        "unknown mode": (["--mode", "fast"], "unknown mode 'fast'"),
        "missing workload": (["--workload", tmp_path / "no.json"], "no.json: no such file"),
        "no models": (["--models", tmp_path / "no.yaml"], "no.yaml: no such file"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "missing file", "line counts", "empty data", "long prompt", "large request", "unknown case", "no adapter",
        "no config", "unknown mode", "missing workload", "no models",
    ],
)  # fmt: skip
def test_a_wrong_input_gets_one_line_and_exit_code_2(name: str, tmp_path: Path) -> None:
    arguments, line = broken_data(tmp_path)[name]
    done = invoke("run", *arguments, "--results", tmp_path / "out")
    assert done.returncode == 2
    (shown,) = [each for each in done.stderr.splitlines() if each.startswith("splitwiser: ")]
    assert line in shown
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# what surrounds a run


@pytest.mark.slow
def test_a_terminal_of_ascii_takes_no_run_its_exit_code(tmp_path: Path) -> None:
    results = tmp_path / "größe ✓"
    terminal: dict[str, Any] = {
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
    }
    done = splitwiser("run", "--limit", "1", "--max_new_tokens", "2", "--results", results, **terminal)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert f"results     {tmp_path}/gr\\" in done.stdout  # and the other letters spelt out
    assert yaml.safe_load((only_run(results) / "run.yaml").read_text())["status"] == "finished"


def as_nobody() -> list[str]:
    """The beginning of a command that runs as a user id without an entry in passwd."""
    command = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    try:
        possible = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("needs unshare and user namespaces, which this machine does not allow")
    return command


@pytest.mark.slow
def test_a_user_without_a_name_and_a_home_has_a_run(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [
        *as_nobody(),
        *COMMAND,
        "run",
        "--limit",
        "1",
        "--max_new_tokens",
        "2",
        "--results",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    record = yaml.safe_load((only_run(tmp_path / "out") / "run.yaml").read_text())
    assert record["status"] == "finished"
    kernel = record["kernels"]["decode_attention"]
    assert "set XDG_CACHE_HOME" in kernel or "no g++" in kernel


def test_ctrl_c_within_a_destructor_still_interrupts() -> None:
    script = """
import sys, time
from splitwiser import cli


class Interrupted:
    def __del__(self):
        raise KeyboardInterrupt


sys.unraisablehook = cli._interrupt_again
try:
    Interrupted()
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_ctrl_c_while_a_dataclass_is_made_gives_the_exit_code_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("""
from splitwiser import cli


def main():
    try:
        exec("import os, signal; os.kill(os.getpid(), signal.SIGINT)")  # dataclasses make their methods by exec
    except KeyboardInterrupt:
        return 130


cli.main = main
cli.entry_point()
""")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "interrupted"], timeout=60, check=False, env=environment)
    assert done.returncode == 130


def test_a_folder_that_has_been_deleted_is_named(tmp_path: Path) -> None:
    script = 'mkdir gone; cd gone; rmdir ../gone; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND, "run", "--results", tmp_path / "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    line = "splitwiser: the current folder has been deleted; change to one that exists\n"
    assert (done.returncode, done.stderr.splitlines(keepends=True)[-1]) == (2, line)
    assert "Traceback" not in done.stderr


def test_results_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = invoke("run", "--limit", "1", "--results", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"splitwiser: --results {tmp_path}/file/out: cannot create a folder there"
    )


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    done = invoke("run", "--case_id", "3", "--results", tmp_path, "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_an_unknown_option_is_refused() -> None:
    done = invoke("run", "--case", "0")  # not taken for --case_id
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "usage: splitwiser run [options]"
    assert "splitwiser: unknown option '--case'; did you mean --cases or --case_id?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "usage", "line"),
    [
        (["rnu"], "usage: splitwiser [-h] [--version] command ...", "unknown command 'rnu'; did you mean run?"),
        (["--colour", "models"], "usage: splitwiser ", "unknown option '--colour'; known: --help, --version"),
        (["run", "--max_batchs", "3"], "usage: splitwiser run ", "unknown option '--max_batchs'; did you mean --"),
        (["run", "--max-batchs=3"], "usage: splitwiser run ", "unknown option '--max-batchs'; did you mean"),
        (["profile", "--batch-size=3"], "usage: splitwiser profile ", "unknown option '--batch-size'; did"),
        (["run", "--limit", "few"], "usage: splitwiser run ", "--limit must be a whole number, not 'few'"),
        (["run", "--top-p", "few"], "usage: splitwiser run ", "--top_p must be a number, not 'few'"),
        (["run", "--model", "opt-125"], "", "unknown model 'opt-125'; did you mean opt-125m"),
        (["run", "--workload", "standrad"], "", "--workload standrad: no such file, and unknown name of configs/"),
        (["run", "--max-batch", "0"], "", "--max_batch must be 1 or more, not 0"),
        (["run", "--temperature=-1"], "", "--temperature must be 0 (greedy) or more, not -1.0"),
        (["run", "--goodput", "tpot=50"], "", "--goodput 'tpot=50': write a metric, a colon and milliseconds, such as"),
        (["advise", "--objective", "thruput"], "", "unknown objective 'thruput'; did you mean throughput?"),
    ],
)  # fmt: skip
def test_a_mistyped_argument_gets_the_usage_and_the_nearest_name(arguments: list[str], usage: str, line: str) -> None:
    done = invoke(*arguments)
    assert done.returncode == 2
    *before, last = done.stderr.splitlines()
    assert last.startswith(f"splitwiser: {line}")
    assert "".join(before).startswith(usage)
    assert bool(before) == bool(usage)


def test_both_spellings_of_an_option_and_the_short_names_of_types_are_taken() -> None:
    done = invoke("run", "--max-batch=2", "--max_new_tokens=2", "--dtype=bf16", "--mode=none")
    assert done.stderr.startswith("splitwiser: unknown mode 'none'")


def test_the_version_is_the_packages() -> None:
    assert invoke("--version").stdout == f"splitwiser {splitwiser_package.__version__}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_standard_error_is_said_on_standard_output() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123  # a device
        done = subprocess.run(
            [*COMMAND, "rnu"], stdout=subprocess.PIPE, stderr=full, text=True, timeout=100, check=False,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )  # fmt: skip
    assert done.returncode == 2
    assert "unknown command 'rnu'; did you mean run? (standard error cannot be written: No space left" in done.stdout


@pytest.mark.parametrize(("command", "shown"), [("cases", "four in-context examples"), ("models", "facebook/opt-125m")])
def test_lists(command: str, shown: str) -> None:
    done = invoke(command)
    assert done.returncode == 0
    assert shown in done.stdout


def start_long_run(tmp_path: Path, model: Path, *options: str) -> "subprocess.Popen[str]":
    """A run of a short request and one that lasts, waited for until the short one is on disk."""
    workload = write_workload(tmp_path / "two.json", [[5]] * 3 + [[6]], 200, arrival_s=[0, 0, 0, 3600])
    process = subprocess.Popen(
        [
            *COMMAND,
            "run",
            "--model",
            model,
            "--workload",
            workload,
            "--ignore_eos",
            "--results",
            tmp_path / "out",
            *options,
        ],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        found = list((tmp_path / "out").glob("*/latency.csv"))
        if found and len(found[0].read_text().splitlines()) == 4:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the first three requests did not reach the disk")


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_finished(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    process = start_long_run(tmp_path, tiny("opt"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    directory = only_run(tmp_path / "out")
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert yaml.safe_load((directory / "run.yaml").read_text())["status"] == "interrupted"
    row = pd.read_csv(directory / "throughput.csv").iloc[0]
    assert (row.completed, row.failed) == (3, 1)
    assert not (tmp_path / "out" / "runs.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("times", "mode"), [(3, "sequential"), (3, "generate"), (20, "mp")])
def test_ctrl_c_again_and_again_leaves_whole_files(
    times: int, mode: str, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    process = start_long_run(tmp_path, tiny("opt"), "--mode", mode)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
        time.sleep(0.01 if times > 3 else 0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "splitwiser: interrupted"
    directory = only_run(tmp_path / "out")
    record = yaml.safe_load((directory / "run.yaml").read_text())
    assert (record["status"], record["unanswered"]) == ("interrupted", [3])
    for name in ("latency.csv", "generations.csv", "tokens.csv"):
        assert pd.read_csv(directory / name).request_id.tolist() == [0, 1, 2]
    assert {path.name for path in directory.iterdir()} <= FILES  # none that is half written
    for path in directory.glob("trace.json"):
        json.loads(path.read_text())


@pytest.mark.slow
def test_terminated_twice_it_still_ends_in_order(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    process = start_long_run(tmp_path, tiny("opt"))
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert yaml.safe_load((only_run(tmp_path / "out") / "run.yaml").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_killed_run_leaves_what_was_finished(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    process = start_long_run(tmp_path, tiny("opt"))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    directory = only_run(tmp_path / "out")
    assert sorted(pd.read_csv(directory / "latency.csv").request_id) == [0, 1, 2]
    assert yaml.safe_load((directory / "run.yaml").read_text())["status"] == "running"


def test_a_fault_in_the_run_gets_exit_code_1_and_keeps_what_was_finished(
    tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = write_workload(tmp_path / "two.json", [[5], [6]], 4, arrival_s=[0, 0.5])
    prefill_step = steps.prefill_step

    def failing(model: LoadedModel, pool: KVPool, chunks: Sequence[Chunk], *_: object) -> Sampled:
        if chunks[0].sequence.request.prompt_token_ids == (6,):
            raise RuntimeError("the device is gone")
        return prefill_step(model, pool, chunks)

    monkeypatch.setattr(steps, "prefill_step", failing)
    done = invoke("run", "--model", tiny("opt"), "--workload", workload, "--ignore_eos", "--results", tmp_path / "out")
    directory = only_run(tmp_path / "out")
    assert done.returncode == 1
    assert "splitwiser: RuntimeError: the device is gone" in done.stderr
    assert "Traceback" not in done.stderr
    record = yaml.safe_load((directory / "run.yaml").read_text())
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: the device is gone")
    assert pd.read_csv(directory / "latency.csv").request_id.tolist() == [0]
