"""What several test modules share: the refusal of a wrong input, answers and steps with known times, and processes."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from splitwiser.engine.messages import Phase, Role, StepRecord
from splitwiser.errors import InputError
from splitwiser.request import FinishReason, RequestMetrics, RequestOutput

MS = 1_000_000  # nanoseconds
START_NS = 7_000 * MS


def refusal(call: Callable[..., object], *arguments: Any, **settings: Any) -> str:
    """The one line with which ``call`` refuses its input."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **settings)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def assert_says(message: str, *parts: str) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{message!r} does not say {missing}"


def make_output(
    request_id: int = 0,
    *,
    arrival: int = 0,
    prefill: int = 0,
    decode: int | None = None,
    tokens: Sequence[int] = (1,),
    prompt_tokens: int = 3,
    text: str = "",
    reason: FinishReason = "length",
    start_ns: int = START_NS,
) -> RequestOutput:
    """An answered request; times in milliseconds from ``start_ns``, ``tokens`` holds the time of each."""
    metrics = RequestMetrics(
        start_ns + arrival * MS,
        prefill_start_ns=start_ns + prefill * MS,
        token_ns=[start_ns + moment * MS for moment in tokens],
        decode_start_ns=None if decode is None else start_ns + decode * MS,
        prefill_worker="prefill-0",
        decode_worker="decode-1",
    )
    return RequestOutput(request_id, tuple(range(prompt_tokens)), [9] * len(tokens), text, reason, metrics)


def make_step(
    worker: str,
    phase: Phase,
    start: int,
    end: int,
    *,
    requests: int = 1,
    tokens: int = 1,
    role: Role = "mixed",
    start_ns: int = START_NS,
) -> StepRecord:
    """A step from ``start`` to ``end``, in milliseconds from ``start_ns``."""
    return StepRecord(worker, role, phase, start_ns + start * MS, start_ns + end * MS, requests, tokens)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)


def processes_naming(path: Path) -> list[int]:
    """Processes with ``path`` in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(path).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def put_mps_programs(folder: Path) -> None:
    """Make ``folder``, with the stand-ins for MPS's daemon and server in it, under the real ones' names."""
    program = Path(__file__).with_name("stand_in_mps.py").read_text()
    folder.mkdir()
    for name in ("nvidia-cuda-mps-control", "nvidia-cuda-mps-server"):
        (folder / name).write_text(f"#!{sys.executable} -S\n{program}")
        (folder / name).chmod(0o755)


LIBCUDA = """
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 3; return 0; }
int cuDeviceGet(int *device, int index) { *device = 10 + index; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 12 ? "NVIDIA A100 MIG 1g.5gb" : device == 11 ? "Tesla P100" : "Tesla V100", length);
    return 0;
}
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, device, 16); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int old = device == 11;
    if (attribute == 75) *value = old ? 6 : 7;
    else if (attribute == 76) *value = 0;
    else if (attribute == 20) *value = device == 10 ? 3 : 0;
    else return 1;
    return 0;
}
int cuGetErrorString(int code, const char **said) { *said = "invalid argument"; return 0; }
"""


def put_cuda_driver(folder: Path) -> None:
    """Build a stand-in for the CUDA driver with three GPUs, ``libcuda.so.1``, into ``folder``; skip the test where there is
    no C compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    (folder / "libcuda.c").write_text(LIBCUDA)
    library, source = folder / "libcuda.so.1", folder / "libcuda.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
