"""Starts a mode: what the module of each defines, and how it is found."""

from contextlib import ExitStack
from importlib import import_module
from typing import Protocol, cast

from splitwiser.placement.config import EngineConfig
from splitwiser.placement.modes import Mode
from splitwiser.placement.prepare import Started


class ModeModule(Protocol):
    """What the module of a mode defines; see :class:`splitwiser.placement.modes.Mode`."""

    def start(self, config: EngineConfig, undo: ExitStack) -> Started:
        """Load ``config``'s model and start an engine over it. ``undo`` gets what must be undone at the end, after a fault
        too.

        Raises :class:`~splitwiser.errors.InputError` where this machine or this model does not allow the mode.
        """
        ...


def module_of(mode: Mode) -> ModeModule:
    """Import the module of ``mode``, which may take seconds."""
    return cast("ModeModule", import_module(f"splitwiser.placement.{mode.module}"))
