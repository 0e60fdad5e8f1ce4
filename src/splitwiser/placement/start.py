"""The interface of the modules that start a mode, and how to import the one of a mode."""

from contextlib import ExitStack
from importlib import import_module
from typing import Protocol, cast

from splitwiser.placement.config import EngineConfig
from splitwiser.placement.modes import Mode
from splitwiser.placement.prepare import StartedEngine


class ModeModule(Protocol):
    """Interface of the module that starts a mode; see :class:`splitwiser.placement.modes.Mode`."""

    def start(self, config: EngineConfig, undo: ExitStack) -> StartedEngine:
        """Load ``config``'s model and start an engine over it.

        Whatever must be undone at the end, also after an error, is registered on ``undo``. Raises
        :class:`~splitwiser.errors.InputError` if this machine or this model does not support the mode.
        """
        ...


def module_of(mode: Mode) -> ModeModule:
    """Import and return the module that starts ``mode``; may take seconds."""
    return cast("ModeModule", import_module(f"splitwiser.placement.{mode.module}"))
