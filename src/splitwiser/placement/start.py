"""Starting a mode: the interface of the modules that do it, and what can begin before PyTorch is imported."""

from contextlib import ExitStack
from importlib import import_module
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Protocol, cast

from splitwiser.machine.process import environment, shorten_socket_paths
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.modes import find_backend, find_mode

if TYPE_CHECKING:
    from splitwiser.placement.prepare import StartedEngine


class ModeModule(Protocol):
    """Interface of the module that starts a mode; see :class:`splitwiser.placement.modes.Mode`."""

    def start(self, config: EngineConfig, undo: ExitStack) -> "StartedEngine":
        """Load ``config``'s model and start an engine over it.

        Whatever must be undone at the end, also after an error, is registered on ``undo``. Raises
        :class:`~splitwiser.errors.InputError` if this machine or this model does not support the mode.
        """
        ...


def module_of(config: EngineConfig) -> ModeModule:
    """Import and return the module that starts ``config``'s mode on its back end; may take seconds."""
    package = find_backend(config.backend).package
    name = f"{package}.start" if package else f"splitwiser.placement.{find_mode(config.mode).module}"
    return cast("ModeModule", import_module(name))


def start_fork_server() -> None:
    """Start the fork server of modes with worker processes, if it is not running: it imports what workers need once, and
    each worker is a copy of it. Its imports take seconds, in which this process does its own."""
    forkserver.set_forkserver_preload(["splitwiser.placement.preloaded"])
    shorten_socket_paths()
    # PYTHONSAFEPATH: a file in the current folder may have the name of a module
    # OMP_WAIT_POLICY: threads on cores lent by other workers must not spin there once their owners need them again
    with environment(OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false", PYTHONSAFEPATH="1"):
        forkserver.ensure_running()
