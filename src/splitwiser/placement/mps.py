"""Mode ``mps``: worker processes, as in mode ``mp``, that are clients of an NVIDIA MPS daemon."""

from contextlib import ExitStack
from dataclasses import replace

from splitwiser.placement import processes
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.mps_daemon import mps_daemon, thread_percentage
from splitwiser.placement.mps_gpu import gpu_index
from splitwiser.placement.prepare import StartedEngine


def start(config: EngineConfig, undo: ExitStack) -> StartedEngine:
    """See :meth:`splitwiser.placement.start.ModeModule.start`; :func:`mps_daemon` checks the machine."""
    index = gpu_index(config.device_name)
    daemon = undo.enter_context(mps_daemon(config.mps == "existing", config.exclusive, index))
    record = {
        "daemon": config.mps,
        "exclusive": config.exclusive,
        "active_thread_percentages": {spec.name: thread_percentage(spec, config.share) for spec in config.specs},
    }
    return replace(processes.start_workers(config, f"cuda:{index}", daemon), mps=record)
