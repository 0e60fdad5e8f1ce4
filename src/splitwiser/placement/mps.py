"""Mode ``mps``: the workers of mode ``mp`` as clients of an NVIDIA MPS daemon."""

from contextlib import ExitStack
from dataclasses import replace

from splitwiser.placement import processes
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.mps_daemon import gpu_index, mps_daemon, thread_percentage
from splitwiser.placement.prepare import Started


def start(config: EngineConfig, undo: ExitStack) -> Started:
    """See :meth:`splitwiser.placement.start.ModeModule.start`; the daemon looks at the machine itself, and more closely."""
    index = gpu_index(config.device_name)
    daemon = undo.enter_context(mps_daemon(config.mps == "existing", config.exclusive, index))
    said = {
        "daemon": config.mps,
        "exclusive": config.exclusive,
        "active_thread_percentages": {spec.name: thread_percentage(spec, config.share) for spec in config.specs},
    }
    return replace(processes.start_workers(config, f"cuda:{index}", daemon), mps=said)
