"""Python imports this module as it starts on the stand-in: it puts the emulator in as soon as what it replaces is there."""

import importlib.util
import pathlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _install(_: ModuleType) -> None:
    from tests.support.stand_in import emulator

    emulator.install()


def _install_decode_attention(module: ModuleType) -> None:
    from tests.support.stand_in import emulator

    emulator.install_decode_attention(module)


class _AfterImport(MetaPathFinder):
    """Calls a function with a module, by its name, when that has been imported."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self._actions = actions

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = self._actions.pop(name, None)
        spec = importlib.util.find_spec(name) if action else None
        if action is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def _exists(self: pathlib.Path, **settings: bool) -> bool:
    return str(self) == "/dev/nvidiactl" or _exists_really(self, **settings)


_exists_really = pathlib.Path.exists
pathlib.Path.exists = _exists  # type: ignore[method-assign]  # the driver's file, where a driver is
sys.meta_path.insert(
    0, _AfterImport({"torch": _install, "splitwiser.model.kernels.gpu_attention": _install_decode_attention})
)
