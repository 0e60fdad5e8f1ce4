"""Probes: checks in a separate process, since they may hang or crash (CUDA, NVML, the hub).

``python -m splitwiser.doctor.probe NAME [ARGUMENT...]`` prints the answer as one line of JSON.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from splitwiser.errors import first_line


class ProbeError(Exception):
    """A probe gave no answer; the message is the reason, on one line."""


_started: dict[tuple[str, ...], "Future[Any]"] = {}
_running: set["subprocess.Popen[str]"] = set()


def ask_ahead(name: str, *arguments: str, deadline_s: float) -> None:
    """Start the probe ``name`` early, so that :func:`ask` with the same arguments waits only for the rest: each probe takes
    seconds, most of them for importing PyTorch."""
    answer: Future[Any] = Future()

    def wait_for_it() -> None:
        try:
            answer.set_result(_ask(name, *arguments, deadline_s=deadline_s))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=wait_for_it, daemon=True).start()
    _started[name, *arguments] = answer


@contextmanager
def stopping_probes() -> Iterator[None]:
    """Kill the probes that are still running at the end of the block, with all processes that they have started."""
    try:
        yield
    finally:
        for process in list(_running):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def ask(name: str, *arguments: str, deadline_s: float) -> Any:  # noqa: ANN401  # each probe has its own type of answer
    """Return the answer of the probe ``name``. Raises :class:`ProbeError` if it gives none within ``deadline_s`` seconds."""
    started = _started.pop((name, *arguments), None)
    return _ask(name, *arguments, deadline_s=deadline_s) if started is None else started.result()


def _ask(name: str, *arguments: str, deadline_s: float) -> Any:  # noqa: ANN401
    output = run_command([sys.executable, "-m", __name__, name, *arguments], deadline_s)
    return json.loads(output.splitlines()[-1])


def run_command(command: list[str], deadline_s: float, text: str = "") -> str:
    """Run ``command`` with ``text`` as its input and return its output. Raises :class:`ProbeError` if it is not found, fails
    or takes longer than ``deadline_s`` seconds; then no process that it started is left."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
        )
    except OSError as error:
        raise ProbeError(f"{command[0]}: {error.strerror}") from error
    _running.add(process)
    try:
        output, errors = process.communicate(text, timeout=deadline_s)
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"no answer within {deadline_s:.0f} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        _running.discard(process)
    if process.returncode:
        raise ProbeError(_describe_failure(errors or output, process.returncode))
    return output


def _describe_failure(errors: str, exit_code: int) -> str:
    """Return the error that a process ended with: the line of a traceback that names the exception."""
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    lines = [line for line in errors.splitlines() if line.strip()] or [f"exit code {exit_code}"]
    raised = [line for line in lines if "Error: " in line and not line.startswith(" ")]
    return (raised or lines)[-1].strip()


def _devices() -> dict[str, Any]:
    """Return the GPUs that PyTorch finds, with the free memory of each, or the reason why it finds none."""
    import torch

    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except Exception as error:
            return {"devices": [], "problem": first_line(error)}
        return {"devices": [], "problem": "CUDA starts, but there is no GPU"}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        devices.append(
            {
                "index": index,
                "name": properties.name,
                "free_bytes": free,
                "total_bytes": total,
                "sms": properties.multi_processor_count,
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {"devices": devices, "problem": None}


def _share_memory(device: str) -> None:
    """Send memory on ``device`` to a second process, as to the workers of mode mp, and read what it wrote there."""
    import torch
    import torch.multiprocessing

    from splitwiser.machine.shared_memory import SharedMemory

    memory = SharedMemory(64, torch.device(device))
    process = torch.multiprocessing.get_context("spawn").Process(target=_write, args=(memory,), daemon=True)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(1)  # the process has printed its error
    if memory.tensor.tolist() != [7] * 64:
        raise RuntimeError("what one process writes is not seen by the other")


def _write(memory: Any) -> None:  # noqa: ANN401  # its module imports torch
    import torch

    memory.tensor.fill_(7)
    if memory.tensor.is_cuda:
        torch.cuda.synchronize(memory.tensor.device)


def _mode(mode: str, device: str) -> str | None:
    """Return why ``mode`` does not work on ``device``, or None."""
    from splitwiser.placement.checks import find_mode_problem

    return find_mode_problem(mode, device)


def _driver() -> dict[str, Any]:
    """Return the driver's settings of each GPU, or the reason why there are none."""
    from splitwiser.machine.nvml import describe_gpus

    return describe_gpus()


def _hub(repository: str) -> None:
    """Request ``repository`` from the hub, or any model if it is empty."""
    from huggingface_hub import HfApi

    if repository:
        HfApi().model_info(repository)
    else:
        next(iter(HfApi().list_models(limit=1)))


PROBES: dict[str, Callable[..., Any]] = {
    "devices": _devices, "driver": _driver, "shares": _share_memory, "mode": _mode, "hub": _hub,
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
