"""Mode ``mps``: the life of a daemon, with a stand-in for NVIDIA's and real workers on the CPU."""

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from splitwiser import LLM, SamplingParams
from splitwiser.engine.messages import Role, WorkerSpec
from splitwiser.errors import RunError
from splitwiser.machine.shared_memory import SharedMemory
from splitwiser.model.loading import load_model
from splitwiser.placement import checks, mps_gpu, prepare
from splitwiser.placement import mps_daemon as mps
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.mps_daemon import mps_daemon, running_daemon, thread_percentage
from splitwiser.placement.mps_gpu import CONTROL, PIPES, Gpu, find_problem
from tests.support.assertions import assert_says, refusal
from tests.support.commands import finished, only_run
from tests.support.mps_programs import put_mps_programs
from tests.support.observers import Trigger
from tests.support.processes import wait_for
from tests.support.running import STAGES, Running
from tests.support.tokens import LENGTHS, prompts_of

pytestmark = pytest.mark.slow

GPU = Gpu(("GPU-00000000-0000-0000-0000-000000000001",), "Stand-in", (9, 0), "DEFAULT")
# a run with a GPU for all that asks for one, and the CPU for all that computes
ON_A_CPU = f"""
from splitwiser.placement import checks, mps_gpu, prepare
from splitwiser.cli import entry_point
mps_gpu.inspect_gpu = lambda index: mps_gpu.{GPU!r}
checks.find_driver_problem = lambda: None
load = prepare.load_model
prepare.load_model = lambda *arguments, **settings: load(*arguments, **{{**settings, "device": "cpu"}})
entry_point()
"""


class StandIn:
    """The stand-in daemon on PATH, and what it was told."""

    def __init__(self, directory: Path) -> None:
        self.bin = directory / "bin"
        self.runtime = Path(tempfile.mkdtemp(dir="/tmp"))  # a unix socket's path is short, and pytest's are long
        put_mps_programs(self.bin)

    def behave(self, words: str) -> None:
        (self.bin / "behaviour").write_text(words)

    @property
    def commands(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.bin / "commands").read_text().splitlines()]

    def processes(self, name: str = "") -> list[int]:
        """All that runs of the stand-in: daemon, server and front ends."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{self.bin / 'nvidia-cuda-mps'}".encode() in command and name.encode() in command:
                found.append(int(entry.name))
        return found

    @property
    def directories(self) -> list[Path]:
        return list(self.runtime.glob("splitwiser-*/*"))

    def assert_nothing_is_left(self) -> None:
        assert self.processes() == []
        assert self.directories == []

    def assert_quit_came_last(self) -> None:
        *_, last = self.commands
        assert last["command"].startswith("quit -t ")
        assert last["clients"] == []


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    made = StandIn(tmp_path)
    monkeypatch.setenv("PATH", str(made.bin), prepend=os.pathsep)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(made.runtime))
    monkeypatch.setattr(mps, "DEFAULT_PIPES", str(tmp_path / "default"))
    monkeypatch.setattr(mps_gpu, "inspect_gpu", lambda _: GPU)
    monkeypatch.setattr(checks, "find_driver_problem", lambda: None)
    monkeypatch.setattr(mps, "FORCE_S", 0.5)
    monkeypatch.delenv(PIPES, raising=False)

    def on_cpu(*arguments: Any, **settings: Any) -> Any:
        return load_model(*arguments, **{**settings, "device": "cpu"})

    monkeypatch.setattr(prepare, "load_model", on_cpu)
    yield made
    for pid in made.processes():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(made.runtime)


def run_mps() -> list[int]:
    with mps_daemon(existing=False, exclusive=False, device_index=0) as daemon:
        return [daemon.pid or 0]


# -- a run


def test_a_run_has_a_daemon_of_its_own_that_outlasts_its_clients(
    stand_in: StandIn, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(mps.PERCENTAGE, "10")  # would cap every client, were the daemon to see it
    prompts = prompts_of(LENGTHS, seed=5)
    with LLM(tiny("opt")) as reference:
        expected = [output.token_ids for output in reference.generate(prompts, SamplingParams(max_tokens=12))]
    before = dict(os.environ)
    workers = [{"role": "prefill", "share": 30}, {"role": "decode", "count": 2}]
    with LLM(tiny("opt"), mode="mps", workers=workers) as split:
        outputs = split.generate(prompts, SamplingParams(max_tokens=12))
        assert dict(os.environ) == before
        assert len(stand_in.processes("nvidia-cuda-mps-control")) == 1
        assert split.started.mps is not None
        assert split.started.mps["active_thread_percentages"] == {"prefill-0": 30, "decode-0": 35, "decode-1": 35}
    assert [output.token_ids for output in outputs] == expected
    environment = stand_in.commands[0]["environment"]
    assert environment["CUDA_VISIBLE_DEVICES"] == GPU.uuids[0]
    assert mps.PERCENTAGE not in environment
    assert max(len(command["clients"]) for command in stand_in.commands) == 3
    stand_in.assert_quit_came_last()
    stand_in.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("role", "decode_priority", "priority"),
    [("prefill", True, "1"), ("decode", True, "0"), ("mixed", True, "0"), ("prefill", False, "0")],
)
def test_prefill_is_a_client_below_the_others(role: Role, decode_priority: bool, priority: str) -> None:
    daemon = mps.MpsDaemon("private", Path("/run/pipes"), Path("/run/logs"), 1, 1, {})
    config = EngineConfig(mode="mps", share="none", decode_priority=decode_priority)
    assert daemon.worker_environment(WorkerSpec("worker", role, 50), config)[mps.PRIORITY] == priority


@pytest.mark.parametrize(("share", "percentage"), [(100, 100), (33.3, 33), (66.7, 67), (0.4, 1)])
def test_a_share_is_a_whole_percentage(share: float, percentage: int) -> None:
    assert thread_percentage(WorkerSpec("decode-0", "decode", share), "fixed") == percentage


def test_workers_that_are_not_on_the_server_are_named(
    stand_in: StandIn, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "REGISTER_S", 0.3)
    stand_in.behave("clientless")
    with pytest.raises(
        RunError, match=r"not on the MPS server: prefill-0 \(process \d+\), decode-0 \(process"
    ) as caught:
        LLM(tiny("opt"), mode="mps")
    assert_says(str(caught.value), "its logs end: control.log:", "server.log: Startup")
    stand_in.assert_quit_came_last()
    stand_in.assert_nothing_is_left()


def test_a_daemon_that_dies_in_mid_run_is_noticed(stand_in: StandIn, tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="mps") as split:
        (daemon,) = stand_in.processes("nvidia-cuda-mps-control")
        trigger = Trigger("prefill", lambda: os.kill(daemon, signal.SIGKILL))
        requests = [[5]] * 40  # more than can end before the next look
        with pytest.raises(RunError) as caught:
            split.generate(requests, SamplingParams(max_tokens=250, ignore_eos=True), observer=trigger)
    message = str(caught.value)
    assert_says(
        message, f"the MPS daemon (process {daemon}) has died; its logs end: control.log: ", "not answered: requests"
    )
    assert "\n" not in message
    stand_in.assert_nothing_is_left()


# -- a daemon that does not do as it should


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("refuse", ["nvidia-cuda-mps-control -d ended with exit code 1", "start.log: Cannot start: no permission"]),
        ("hang", ["nvidia-cuda-mps-control -d did not return within 1 s"]),
        ("dead", ["nvidia-cuda-mps-control -d died as it started", "control.log: Failed to bind"]),
        (
            "mute",
            ["did not answer within 1 s (the MPS daemon did not answer 'get_server_list' within 1 s)", "Starting"],
        ),
    ],
)
def test_a_daemon_that_does_not_come_up(
    behaviour: str, said: list[str], stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "START_S", 1.0)
    monkeypatch.setattr(mps, "COMMAND_S", 1.0)
    monkeypatch.setattr(mps, "QUIT_S", 0)
    stand_in.behave(behaviour)
    with pytest.raises(RunError) as caught:
        run_mps()
    assert_says(str(caught.value), *said)
    stand_in.assert_nothing_is_left()


@pytest.mark.parametrize("behaviour", ["stubborn", "stubborn immortal"])
def test_a_daemon_that_does_not_quit_is_ended(
    behaviour: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mps, "QUIT_S", 0)
    monkeypatch.setattr(mps, "COMMAND_S", 1.0)
    stand_in.behave(behaviour)
    run_mps()
    stand_in.assert_nothing_is_left()
    assert "the MPS daemon is ended by force: the MPS daemon did not answer 'quit -t 0'" in capsys.readouterr().err


def test_a_program_that_is_missing_or_cannot_be_run(stand_in: StandIn) -> None:
    (stand_in.bin / "nvidia-cuda-mps-control").write_text("#!/nowhere/at/all\n")
    with pytest.raises(RunError, match="nvidia-cuda-mps-control -d cannot be run"):
        run_mps()
    stand_in.assert_nothing_is_left()


def test_where_a_directory_is_too_long_for_a_socket_another_is_taken(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = stand_in.runtime / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", str(stand_in.runtime))
    with mps_daemon(existing=False, exclusive=False, device_index=0) as daemon:
        assert daemon.pipe_directory.parent in stand_in.directories
    stand_in.assert_nothing_is_left()


# -- every way out of the command


@pytest.fixture
def running(stand_in: StandIn, tmp_path: Path, tiny: Callable[[str], Path]) -> Iterator[Running]:
    assert stand_in.processes() == []
    run = Running(tmp_path, tiny("opt"), "mps", [sys.executable, "-c", ON_A_CPU])
    yield run
    run.process.kill()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_runs_leave_no_daemon(number: int, exit_code: int, stand_in: StandIn, running: Running) -> None:
    running.wait_until_three_are_finished()
    if number == signal.SIGINT:
        os.killpg(running.process.pid, number)  # as a terminal does: the whole group gets it
    else:
        running.process.terminate()
    errors = running.ended()
    assert running.process.returncode == exit_code, errors
    assert finished(running.results) == [0, 1, 2]
    stand_in.assert_quit_came_last()
    stand_in.assert_nothing_is_left()
    record = yaml.safe_load((only_run(running.results) / "run.yaml").read_text())
    assert record["mps"] == {
        "daemon": "private", "exclusive": False, "active_thread_percentages": {"prefill-0": 50, "decode-0": 50}
    }  # fmt: skip


def test_ctrl_c_again_and_again_leaves_no_daemon(stand_in: StandIn, running: Running) -> None:
    running.wait_until_three_are_finished()
    os.kill(running.worker("decode-0"), signal.SIGSTOP)  # so that the drain takes its whole time
    for _ in range(12):
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGINT)
        time.sleep(0.5)
    errors = running.ended()
    assert running.process.returncode == 130, errors
    stand_in.assert_quit_came_last()
    stand_in.assert_nothing_is_left()


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_during_start_leaves_no_daemon(stage: str, stand_in: StandIn, running: Running) -> None:
    running.wait_for_stage(stage)
    os.killpg(running.process.pid, signal.SIGINT)
    running.ended()
    assert running.process.returncode == 130
    stand_in.assert_nothing_is_left()


def test_a_killed_worker_ends_the_run_and_the_daemon(stand_in: StandIn, running: Running) -> None:
    running.wait_until_three_are_finished()
    os.kill(running.worker("prefill-0"), signal.SIGKILL)
    errors = running.ended()
    assert running.process.returncode == 1
    assert_says(errors, "worker prefill-0 (process", "was killed by SIGKILL; not answered: requests 3")
    stand_in.assert_quit_came_last()
    stand_in.assert_nothing_is_left()


def test_what_a_killed_run_leaves_goes_at_the_next_start(stand_in: StandIn, running: Running) -> None:
    running.wait_until_three_are_finished()
    running.process.kill()
    running.ended()
    (left,) = stand_in.processes("nvidia-cuda-mps-control")
    assert len(stand_in.directories) == 1
    assert run_mps() != [left]
    stand_in.assert_nothing_is_left()


def test_the_daemon_of_another_run_is_not_in_the_way(stand_in: StandIn, running: Running) -> None:
    running.wait_until_three_are_finished()
    (other,) = stand_in.processes("nvidia-cuda-mps-control")
    run_mps()
    assert stand_in.processes("nvidia-cuda-mps-control") == [other]
    running.process.terminate()
    running.ended()
    stand_in.assert_nothing_is_left()


# -- a daemon that is already there


@pytest.fixture
def existing(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> int:
    pipes, logs = stand_in.runtime / "pipes", stand_in.runtime / "logs"
    pipes.mkdir()
    logs.mkdir()
    monkeypatch.setenv(PIPES, str(pipes))
    monkeypatch.setenv(mps.LOGS, str(logs))
    subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, timeout=30)
    wait_for((pipes / "control").exists, "pipe of the daemon")
    (pid,) = stand_in.processes("nvidia-cuda-mps-control")
    return pid


def test_a_daemon_that_is_there_is_told_and_refused(existing: int, stand_in: StandIn) -> None:
    there = running_daemon()
    assert there is not None
    assert (there.pid, there.user, there.pipe_directory) == (existing, getpass.getuser(), stand_in.runtime / "pipes")
    line = refusal(run_mps)
    assert_says(line, f"MPS daemon of user {getpass.getuser()} (process {existing},", "--mps existing")


def test_a_daemon_that_is_there_is_used_and_left(existing: int, stand_in: StandIn, tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), mode="mps", mps="existing") as split:
        split.generate([[5]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert stand_in.processes("nvidia-cuda-mps-control") == [existing]
    assert not any(record["command"].startswith("quit") for record in stand_in.commands)
    assert stand_in.directories == []


@pytest.mark.usefixtures("stand_in")
def test_no_daemon_is_there(tiny: Callable[[str], Path]) -> None:
    assert running_daemon() is None
    line = refusal(LLM, tiny("opt"), mode="mps", mps="existing")
    assert_says(line, "--mps existing: no MPS daemon answers in", "--mps private")


def test_the_pid_file_of_a_killed_daemon_is_no_daemon(existing: int) -> None:
    os.kill(existing, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while running_daemon() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running_daemon() is None


# -- the compute mode

NVIDIA_SMI = """#!/bin/bash
here=$(dirname "$0")
[ "$1 $2" = "-i GPU-00000000-0000-0000-0000-000000000001" ] || exit 6
case "$3" in
    --query-gpu=compute_mode) cat "$here/mode" ;;
    -c) [ -e "$here/root" ] || { echo "Insufficient Permissions"; exit 4; }
        echo "$4" >"$here/mode" ;;
esac
"""


@pytest.fixture
def mode(stand_in: StandIn) -> Path:
    (stand_in.bin / "nvidia-smi").write_text(NVIDIA_SMI)
    (stand_in.bin / "nvidia-smi").chmod(0o755)
    (stand_in.bin / "root").touch()
    (stand_in.bin / "mode").write_text("Default\n")
    return stand_in.bin / "mode"


def test_exclusive_makes_the_parent_a_client_and_restores_the_mode(mode: Path, stand_in: StandIn) -> None:
    with mps_daemon(existing=False, exclusive=True, device_index=0) as daemon:
        assert mode.read_text() == "EXCLUSIVE_PROCESS\n"
        assert os.environ[PIPES] == str(daemon.pipe_directory)
        assert mps.PERCENTAGE not in os.environ
    assert mode.read_text() == "DEFAULT\n"
    assert PIPES not in os.environ
    stand_in.assert_nothing_is_left()


def test_exclusive_without_root_is_refused(mode: Path, stand_in: StandIn) -> None:
    mode.with_name("root").unlink()
    line = refusal(lambda: mps_daemon(existing=False, exclusive=True, device_index=0).__enter__())
    assert_says(line, "--exclusive", "Insufficient Permissions", "needs root")
    stand_in.assert_nothing_is_left()


@pytest.mark.usefixtures("mode")
def test_exclusive_after_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    line = refusal(lambda: mps_daemon(existing=False, exclusive=True, device_index=0).__enter__())
    assert_says(line, "has initialised CUDA already", "fresh process")


def test_the_mode_that_a_killed_run_changed_goes_back(mode: Path, stand_in: StandIn) -> None:
    script = """
import os, signal
from splitwiser.placement import mps_daemon, mps_gpu
mps_gpu.inspect_gpu = lambda index: mps_gpu.%r
with mps_daemon.mps_daemon(existing=False, exclusive=True, device_index=0):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script % GPU], timeout=120, check=False)
    assert (killed.returncode, mode.read_text()) == (-signal.SIGKILL, "EXCLUSIVE_PROCESS\n")
    run_mps()
    assert mode.read_text() == "DEFAULT\n"
    stand_in.assert_nothing_is_left()


# -- where mode mps cannot run


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "mps", "device": "cpu"}, ["needs an NVIDIA GPU", "device is 'cpu'", "use mode mp"]),
        ({"mode": "mps", "mps": "shared"}, ["unknown --mps 'shared'", "private, existing"]),
        ({"mode": "mp", "exclusive": True}, ["exclusive goes with mode mps"]),
        ({"mode": "mps", "mps": "existing", "exclusive": True}, ["a private daemon"]),
        ({"mode": "mp", "mps": "existing"}, ["mps existing", "mode mps"]),
    ],
)
def test_options_that_make_no_sense_are_refused(
    settings: dict[str, Any], said: list[str], tiny: Callable[[str], Path]
) -> None:
    assert_says(refusal(LLM, tiny("opt"), **settings), *said)


# -- on a GPU


def _open(memory: SharedMemory, answers: Any) -> None:
    answers.send((torch.cuda.is_initialized(), memory.tensor.sum().item(), torch.cuda.is_initialized()))


@pytest.mark.gpu
def test_memory_that_arrives_does_not_initialise_cuda() -> None:
    memory = SharedMemory(1000, torch.device("cuda", 0))
    memory.tensor.fill_(3)
    context = torch.multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_open, args=(memory, send))
    process.start()
    process.join(120)
    assert receive.poll(0)
    assert receive.recv() == (False, 3000, True)


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which(CONTROL) is None, reason=f"{CONTROL} is not on PATH")
@pytest.mark.parametrize("workers", ["", "[{role: mixed, count: 3}]"])
def test_tokens_on_a_gpu_are_those_of_mode_sequential(workers: str, tiny: Callable[[str], Path]) -> None:
    problem = find_problem("cuda:0")
    if problem:
        pytest.skip(problem)
    prompts = prompts_of(LENGTHS, seed=5)
    made = []
    for mode, layout in (("sequential", ""), ("mps", workers)):
        with LLM(tiny("opt"), device="cuda", mode=mode, workers=layout) as split:
            made.append([output.token_ids for output in split.generate(prompts, SamplingParams(max_tokens=24))])
    assert made[0] == made[1]
