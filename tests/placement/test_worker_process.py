"""A worker process: what it has before it does anything, and what importing it leaves alone."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from splitwiser.engine.messages import WorkerSpec
from splitwiser.placement import worker_process
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.mps_daemon import PERCENTAGE, MpsDaemon
from splitwiser.placement.mps_gpu import PIPES


def test_a_worker_has_its_environment_before_it_does_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    receive, send = multiprocessing.Pipe(duplex=False)
    monkeypatch.setattr(worker_process, "_run", lambda *_: send.send(dict(os.environ)))
    monkeypatch.delenv(PERCENTAGE, raising=False)
    pipes = Path("/run/pipes")
    daemon = MpsDaemon("private", pipes, Path("/run/logs"), 1, 1, {PIPES: str(pipes)})
    spec = WorkerSpec("decode-0", "decode", 33.3)
    setup = SimpleNamespace(
        environment=daemon.worker_environment(spec, EngineConfig(mode="mps")), spec=spec, receive_ends={}, send_ends={}
    )
    worker = multiprocessing.get_context("fork").Process(target=worker_process.worker_main, args=(setup,))
    worker.start()
    worker.join(30)
    assert receive.poll(0)
    assert receive.recv().items() >= {PIPES: "/run/pipes", PERCENTAGE: "33"}.items()


@pytest.mark.slow
def test_what_the_fork_server_imports_leaves_cuda_alone() -> None:
    script = """
import torch
def used(*_): raise SystemExit("CUDA was asked")
for name in ("is_available", "device_count", "init", "_lazy_init"):
    setattr(torch.cuda, name, used)
import splitwiser.placement.worker_process
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
