"""What the doctor finds here, in broken environments and on a GPU machine's answers; and that a run says the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from splitwiser.doctor import diagnose as doctor
from splitwiser.doctor import survey
from splitwiser.doctor.config import DoctorConfig
from splitwiser.doctor.diagnose import Diagnosis, Finding, diagnose
from splitwiser.doctor.probe import ProbeError
from splitwiser.llm import LLM
from splitwiser.machine import cgroup
from splitwiser.machine import load as machine_load
from splitwiser.machine.load import Load
from splitwiser.model.checkpoints.catalog import EMBEDDED_MODEL, resolve_model
from splitwiser.model.kernels.interface import AttentionKernel, PoolKernels
from splitwiser.placement.modes import MODES
from tests.support.assertions import refusal
from tests.support.commands import COMMAND, invoke, splitwiser
from tests.support.processes import wait_for

NAMES = {
    "python", "pytorch", "transformers", "vllm", "devices", "device", "driver", "cuda_ipc", "green_contexts", "mps_binary",
    "mps_daemon", "processor", "cores", "load", "compiler", "kernel", "main_memory", "shared_memory", "dev_shm",
    "open_files", "hub", "model", "weights_and_pool",
}  # fmt: skip

EMBEDDED = Path(resolve_model(EMBEDDED_MODEL).location)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"

Ask = Callable[..., Any]


def found(diagnosis: Diagnosis, name: str) -> Finding:
    (finding,) = (finding for finding in diagnosis.findings if finding.name == name)
    return finding


def verdicts(diagnosis: Diagnosis) -> dict[str, bool]:
    return {mode.mode: mode.works for mode in diagnosis.modes}


def note(diagnosis: Diagnosis, mode: str) -> str:
    return next(each.note for each in diagnosis.modes if each.mode == mode)


@pytest.fixture(scope="module")
def tiny(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny models, with a tokenizer: without one no run takes text, and the doctor says so."""

    def get(name: str) -> Path:
        directory = tmp_path_factory.mktemp("with_tokenizer") / f"tiny-{name}"
        shutil.copytree(tiny(name), directory)
        for file in TOKENIZER:
            shutil.copy(EMBEDDED / file, directory)
        return directory

    return get


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the processes that the doctor of this process would start answer, by probe; an exception is raised."""
    given: dict[str, Any] = {"shares": None, "mode": None, "devices": {"devices": [], "problem": "no driver"}}

    def ask(name: str, *_: str, deadline_s: float) -> object:
        assert deadline_s < 600
        if isinstance(given[name], Exception):
            raise given[name]
        return given[name]

    for module in (doctor, survey):
        monkeypatch.setattr(module, "ask", ask)
        monkeypatch.setattr(module, "ask_ahead", lambda *_, **__: None)
    return given


# the command


def test_this_machine_can_run_a_tiny_model(tiny: Callable[[str], Path]) -> None:
    done = invoke("doctor", "--model", tiny("llama"), "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    table = done.stdout.split("mode        works")[1].splitlines()
    assert [line.split()[:2] for line in table[1:4]] == [["generate", "yes"], ["sequential", "yes"], ["mp", "yes"]]
    assert "sent to a second process was written there and read back" in done.stdout


def test_json_is_whole_and_its_keys_are_stable(tiny: Callable[[str], Path]) -> None:
    done = invoke("doctor", "--model", tiny("llama"), "--device", "cpu", "--json")
    told = json.loads(done.stdout)
    assert list(told) == ["works", "model", "device", "findings", "modes"]
    assert (told["works"], told["model"], told["device"]) == (True, "tiny-llama", "cpu")
    assert [mode["mode"] for mode in told["modes"]] == list(MODES)
    assert {finding["name"] for finding in told["findings"]} == NAMES
    assert all(list(finding) == ["section", "name", "ok", "text", "figures"] for finding in told["findings"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "blocked"),
    [
        ("transformers", "transformers: cannot be imported (ImportError: libx.so: missing)"),
        ("torch", "pytorch: cannot"),
    ],
)
def test_a_broken_package_is_a_finding_and_the_rest_is_found_nonetheless(
    package: str, blocked: str, tmp_path: Path
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text('raise ImportError("libx.so: missing")')
    done = splitwiser("doctor", "--json", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.returncode == 1
    assert done.stderr == "splitwiser: no mode will work here; the reasons are above\n"
    told = json.loads(done.stdout)
    assert {finding["name"] for finding in told["findings"]} == NAMES
    assert all(mode["note"].startswith(blocked) and not mode["works"] for mode in told["modes"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "opt-125"], "unknown model 'opt-125'; did you mean opt-125m"),
        (["--device", "gpu"], "--device 'gpu': must be auto, cpu, cuda or cuda:N"),
        (["--kv-memory", "lots"], "--kv_memory 'lots' is not a size"),
        (["--dtype", "float8"], "unknown --dtype 'float8'"),
    ],
)
def test_a_wrong_input_gets_one_line_and_exit_code_2(arguments: list[str], line: str) -> None:
    done = invoke("doctor", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"splitwiser: {line}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'splitwiser.doctor.probe' in sys.orig_argv:\n"
        f"    open({str(marks)!r} + '/' + str(os.getpid()), 'w').close()\n"
        "    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen(
        [*COMMAND, "doctor", "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    wait_for(lambda: bool(list(marks.iterdir())), "start of the probe")
    errors = None
    for _ in range(3):  # Python drops an interrupt that comes while it runs a callback, as of the garbage collector
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            _, errors = process.communicate(timeout=20)
            break
    (probe,) = marks.iterdir()
    assert (process.returncode, errors) == (130, "splitwiser: interrupted\n")
    wait_for(lambda: not Path(f"/proc/{probe.name}").exists(), "end of the probe")


# a run says the same


def point(path: Path) -> None:
    path.write_bytes(POINTER)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("files", "damage", "line"),
    [
        (["model.safetensors"], point, "model.safetensors: a Git LFS pointer"),
        (["model.safetensors"], cut, "model.safetensors: cannot be opened as safetensors, or is truncated"),
        (["tokenizer.json"], cut, "m's tokenizer cannot be loaded: "),
        (TOKENIZER, Path.unlink, "m has no tokenizer; give its prompt as token ids"),
    ],
)  # fmt: skip
def test_a_damaged_folder_gets_the_line_of_a_run(
    files: list[str], damage: Callable[[Path], object], line: str, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    model = shutil.copytree(tiny("opt"), tmp_path / "m")
    for file in files:
        damage(model / file)
    said = invoke("doctor", "--model", model, "--device", "cpu", "--json")
    run = invoke("run", "--model", model, "--results", tmp_path / "out", "--limit", "1")
    refused = run.stderr.splitlines()[-1]
    assert (said.returncode, run.returncode) == (1, 2)
    assert said.stderr == "splitwiser: no mode will work here; the reasons are above\n"
    told = json.loads(said.stdout)
    (finding,) = (each for each in told["findings"] if each["name"] == "model")
    assert finding["ok"] is False
    assert line in finding["text"]
    assert refused.removeprefix("splitwiser: ").removeprefix("request 0: ") == finding["text"]
    assert {mode["note"] for mode in told["modes"][:3]} == {finding["text"]}


def test_prompts_of_token_ids_need_no_tokenizer(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    model = shutil.copytree(tiny("opt"), tmp_path / "m")
    for file in TOKENIZER:
        (model / file).unlink()
    assert not diagnose(DoctorConfig(model=str(model), device="cpu")).works
    assert diagnose(DoctorConfig(model=str(model), device="cpu", prompt_tokens="9")).works


def test_weights_that_do_not_fit(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitwiser.machine.memory.available_memory", lambda: 1000)
    said = diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu"))
    assert not said.works
    assert found(said, "weights_and_pool").ok is False
    for mode in ("generate", "sequential", "mp"):
        assert note(said, mode) == refusal(LLM, tiny("llama"), mode=mode, device="cpu")


def test_a_pool_of_int8_is_expected_to_take_a_byte_a_number_and_a_scale(tiny: Callable[[str], Path]) -> None:
    sizes = [
        found(
            diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu", kv_dtype=kv_dtype)), "weights_and_pool"
        ).figures
        for kv_dtype in ("auto", "int8")
    ]
    assert 16 * sizes[0]["pool_bytes"] == 48 * sizes[1]["pool_bytes"]  # heads of 12 numbers


def test_a_pool_that_does_not_fit_stops_the_modes_that_have_one(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitwiser.machine.memory.available_memory", lambda: 1 << 30)
    said = diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu", kv_memory="2GiB"))
    assert verdicts(said) == {"generate": True, "sequential": False, "mp": False, "mps": False, "green": False}
    assert note(said, "mp") == refusal(LLM, tiny("llama"), mode="mp", device="cpu", kv_memory="2GiB")


def test_an_architecture_that_the_engine_cannot_reach_runs_in_mode_generate(tiny: Callable[[str], Path]) -> None:
    said = diagnose(DoctorConfig(model=str(tiny("roformer")), device="cpu"))
    assert verdicts(said) == {"generate": True, "sequential": False, "mp": False, "mps": False, "green": False}
    assert note(said, "sequential") == refusal(LLM, tiny("roformer"), device="cpu")


def test_a_model_of_another_kind_runs_in_no_mode(tmp_path: Path) -> None:
    models = tmp_path / "models.yaml"
    models.write_text("ears: {hub: none/ears, config: {model_type: whisper}}\n", encoding="utf-8")
    said = diagnose(DoctorConfig(model="ears", models=str(models), load_format="dummy", device="cpu"))
    assert not said.works
    assert note(said, "generate") == refusal(LLM, "ears", models=str(models), load_format="dummy", device="cpu")


def test_where_anonymous_files_are_forbidden_mode_mp_does_not_work(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    said = diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu"))
    assert verdicts(said) == {"generate": True, "sequential": True, "mp": False, "mps": False, "green": False}
    refused = refusal(LLM, tiny("llama"), mode="mp", device="cpu")
    assert refused == f"mode mp: {note(said, 'mp')}; use mode sequential"


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_is_told_where_kernels_could_be_kept(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    said = diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu"))
    assert said.works
    assert note(said, "sequential").startswith("decode attention: plain PyTorch (")
    assert "no home folder to keep it; set XDG_CACHE_HOME" in note(said, "sequential") or not shutil.which("g++")
    assert found(said, "kernel").figures["cache"] is None


def test_a_gpu_that_is_not_there(tiny: Callable[[str], Path]) -> None:
    said = diagnose(DoctorConfig(model=str(tiny("llama")), device="cuda:7"))
    assert (said.works, said.device) == (False, None)
    assert note(said, "sequential") == refusal(LLM, tiny("llama"), device="cuda:7")


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "qwen3", "t5"])
def test_the_pool_is_estimated_as_it_becomes(name: str, tiny: Callable[[str], Path]) -> None:
    said = diagnose(DoctorConfig(model=str(tiny(name)), device="cpu", max_batch=3))
    with LLM(tiny(name), device="cpu", max_batch=3) as llm:
        assert llm.started.pool is not None
        weights = sum(parameter.nbytes for parameter in llm.model.module.parameters())
        figures = found(said, "weights_and_pool").figures
        assert (figures["weights_bytes"], figures["pool_bytes"]) == (weights, llm.started.pool.nbytes)


def test_a_pool_sized_by_itself_takes_a_quarter_of_what_the_weights_leave(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitwiser.machine.memory.available_memory", lambda: 1_000_000)
    figures = found(diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu")), "weights_and_pool").figures
    block = 3 * 2 * (12 + 12) * 4 * 16  # layers, heads, keys and values, bytes, tokens
    assert figures["weights_bytes"] > 300_000
    assert figures["pool_bytes"] == (1_000_000 - figures["weights_bytes"]) // 4 // block * block


# models of the hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.mark.usefixtures("hub_cache")
def test_a_model_to_be_downloaded_is_said_to_be_and_the_hub_is_left_alone(answers: dict[str, Any]) -> None:
    assert "hub" not in answers  # so that asking would fail
    said = diagnose(DoctorConfig(model="opt-125m", device="cpu"))
    assert note(said, "sequential") == "not in the local cache, so a run downloads it first"
    assert (found(said, "hub").ok, found(said, "hub").figures["tried"]) == (None, False)
    assert found(said, "weights_and_pool").figures["weights_bytes"] == 4 * 125_239_296


def test_a_model_in_the_cache_is_found_there(hub_cache: Path, tiny: Callable[[str], Path]) -> None:
    repository = hub_cache / "models--someone--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(tiny("llama"), repository / "snapshots" / "abc")
    said = diagnose(DoctorConfig(model="someone/mine", device="cpu"))
    assert verdicts(said)["mp"]
    assert found(said, "model").text == "mine at someone/mine: in the local cache"


@pytest.mark.parametrize(("offline", "reason"), [(True, "HF_HUB_OFFLINE is set"), (False, "no such host")])
@pytest.mark.usefixtures("hub_cache")
def test_a_model_that_cannot_be_had_says_what_would_be_right(
    offline: bool, reason: str, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    answers["hub"] = ProbeError("no such host")
    said = diagnose(DoctorConfig(model="opt-125m", device="cpu", hub=not offline))
    assert not said.works
    assert note(said, "mp").startswith("model opt-125m: facebook/opt-125m is neither in the local cache nor available")
    assert note(said, "mp").endswith(f"({reason})")
    assert diagnose(DoctorConfig(model="opt-125m", device="cpu", load_format="dummy")).works


# a machine with a GPU, by its answers

GPU = {
    "index": 0, "name": "a GPU", "free_bytes": 70 << 30, "total_bytes": 80 << 30, "sms": 132, "compute_capability": "9.0",
}  # fmt: skip


@pytest.fixture
def gpu(answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    answers["devices"] = {"devices": [GPU], "problem": None}
    return answers


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_chosen_and_its_free_memory_counts(tiny: Callable[[str], Path]) -> None:
    said = diagnose(DoctorConfig(model=str(tiny("llama"))))
    assert said.device == "cuda:0"
    assert found(said, "devices").text == "cuda:0 a GPU, compute capability 9.0, 132 SMs, 70.0 GiB of 80.0 GiB free"
    assert found(said, "weights_and_pool").figures["free_bytes"] == 70 << 30
    assert verdicts(said)["mp"]


def test_without_cuda_ipc_one_process_still_works(gpu: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    gpu["shares"] = ProbeError("RuntimeError: CUDA error: invalid resource handle")
    said = diagnose(DoctorConfig(model=str(tiny("llama"))))
    assert found(said, "cuda_ipc").ok is False
    assert (verdicts(said)["sequential"], verdicts(said)["mp"]) == (True, False)
    assert "CUDA error: invalid resource handle" in note(said, "mp")


def test_green_contexts_are_what_their_check_says(gpu: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    assert found(diagnose(DoctorConfig(model=str(tiny("llama")))), "green_contexts").ok
    gpu["mode"] = "the driver is too old"
    finding = found(diagnose(DoctorConfig(model=str(tiny("llama")))), "green_contexts")
    assert (finding.ok, finding.text) == (False, "the driver is too old")


def test_a_driver_that_does_not_answer_is_a_finding(gpu: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    gpu["devices"] = ProbeError("no answer within 60 s")
    said = diagnose(DoctorConfig(model=str(tiny("llama"))))
    assert (found(said, "devices").ok, found(said, "devices").text) == (False, "no answer within 60 s")
    assert (said.device, said.works) == ("cpu", True)


def test_compute_mode_and_mig_are_those_of_the_driver(gpu: dict[str, Any], tiny: Callable[[str], Path]) -> None:
    exclusive = {"index": 0, "driver_version": "580.65.06", "compute_mode": "EXCLUSIVE_PROCESS", "mig_mode": "disabled"}
    gpu["driver"] = {"gpus": [exclusive], "problem": None}
    finding = found(diagnose(DoctorConfig(model=str(tiny("llama")))), "driver")
    assert (finding.ok, finding.figures) == (False, {"gpus": [exclusive]})
    assert finding.text.startswith("GPU 0: driver 580.65.06, compute mode EXCLUSIVE_PROCESS, MIG disabled (one process")


# the processor and what breaks


def test_a_quota_below_the_cores_is_pointed_out(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cgroup, "cpu_quota", lambda: 1.5)
    finding = found(diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu")), "cores")
    assert (finding.ok, finding.figures["cores"], finding.figures["quota"]) == (False, 4, 1.5)


@pytest.mark.parametrize(
    ("others", "ok", "part"),
    [
        (1.6, None, "others use 1.6 of 2 cores now, load average 8.5: measurements made meanwhile do not"),
        (0.1, True, "others use 0.1 of 2 cores now, load average 8.5"),
        (None, None, "the system does not report"),
    ],
)
def test_what_others_use_is_a_finding_and_no_obstacle(
    others: float | None, ok: bool | None, part: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_load, "measure_load", lambda: Load(0.2, 8.5, 2.0, 0.0, others, 0.9))
    diagnosis = diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu"))
    finding = found(diagnosis, "load")
    assert (finding.section, finding.ok) == ("processor", ok)
    assert finding.text.startswith(part)
    assert finding.figures == {"load_average": 8.5, "others_cores": others, "cpu_pressure": 0.9}
    assert verdicts(diagnosis)["sequential"]


def test_prefill_that_is_left_to_pytorch_is_said(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> tuple[PoolKernels, dict[str, str]]:
        return PoolKernels(decode=cast("AttentionKernel", print)), {
            "prefill_attention": "PyTorch's own", "decode_attention": "compiled"
        }  # fmt: skip

    monkeypatch.setattr("splitwiser.model.kernels.choose.load_kernels", load)
    finding = found(diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu")), "kernel")
    assert finding.ok
    assert "compiled; prefill: PyTorch's own; kept in " in finding.text


def test_a_kernel_that_cannot_be_kept_is_done_without(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    said = diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu"))
    assert found(said, "kernel").ok is False
    assert note(said, "sequential").startswith("decode attention: plain PyTorch (")
    assert note(said, "generate") == ""


def test_a_check_that_breaks_is_a_finding(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "statvfs", broken)
    said = diagnose(DoctorConfig(model=str(tiny("llama")), device="cpu"))
    assert found(said, "dev_shm").ok is False
    assert found(said, "dev_shm").text.startswith("cannot be determined (FileNotFoundError: ")
    assert said.works
