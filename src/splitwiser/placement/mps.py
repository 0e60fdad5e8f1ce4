"""Mode ``mps``: worker processes, as in mode ``mp``, that are clients of an NVIDIA MPS daemon."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from splitwiser.placement import processes
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.mps_daemon import MpsDaemon, mps_daemon, thread_percentage
from splitwiser.placement.mps_gpu import gpu_index
from splitwiser.placement.prepare import StartedEngine


def start(config: EngineConfig, undo: ExitStack) -> StartedEngine:
    """See :meth:`splitwiser.placement.start.ModeModule.start`; :func:`mps_daemon` checks the machine."""
    daemon, record = provide_daemon(config, undo)
    return replace(processes.start_workers(config, f"cuda:{gpu_index(config.device_name)}", daemon), mps=record)


def provide_daemon(config: EngineConfig, undo: ExitStack) -> tuple[MpsDaemon, dict[str, Any]]:
    """Return the daemon of a run, which ``undo`` ends if it is the run's own, and what the run's record says of it.

    Raises the errors of :func:`mps_daemon`."""
    daemon = undo.enter_context(mps_daemon(config.mps == "existing", config.exclusive, gpu_index(config.device_name)))
    return daemon, {
        "daemon": config.mps,
        "exclusive": config.exclusive,
        "active_thread_percentages": {spec.name: thread_percentage(spec, config.share) for spec in config.specs},
    }
