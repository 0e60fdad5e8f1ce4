"""Builds the stand-ins for CUDA's libraries, and runs commands on them."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.mps_programs import put_mps_programs

HERE = Path(__file__).parent
PROJECT = HERE.parents[2]
PACKAGES = Path(sysconfig.get_path("purelib"))
CUDA = PACKAGES / "nvidia" / "cu13"
# cuda_runtime_api.h includes headers of nvcc's, which Triton brings along
INCLUDES = ("-I", str(CUDA / "include"), "-isystem", str(PACKAGES / "triton" / "backends" / "nvidia" / "include"))
FLAGS = ("-O1", "-std=c++17", "-fPIC", "-Wall", "-Wextra")
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"


def find_problem() -> str | None:
    """Why the stand-in cannot be used here, in a line; None if it can."""
    if torch.version.cuda is None or not (CUDA / "lib" / RUNTIME).exists():
        return f"needs PyTorch for CUDA 13 (scripts/test_stand_in.sh installs it), and this is {torch.__version__}"
    if torch.cuda.is_available():
        return "there is a GPU"
    if shutil.which("g++") is None:
        return "needs g++ to build it"
    if importlib.util.find_spec("triton") is None:
        return "needs the CUDA headers that Triton brings along"
    return None


def build(folder: Path) -> None:
    """Build the two libraries into ``folder``."""
    scratch = folder / "objects"
    scratch.mkdir(parents=True)
    objects = {}
    for source in sorted(HERE.glob("*.cpp")):
        objects[source.stem] = str(scratch / f"{source.stem}.o")
        _run("g++", *FLAGS, *INCLUDES, "-c", str(source), "-o", objects[source.stem])
    own = [objects["device"], objects["cudart"]]
    missing = scratch / "missing.cpp"
    names = _exported(CUDA / "lib" / RUNTIME, "--dynamic") - set().union(*(_exported(Path(each)) for each in own))
    missing.write_text("".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in sorted(names)))
    _run("g++", "-fPIC", "-c", str(missing), "-o", str(scratch / "missing.o"))
    # PyTorch asks for the runtime's functions by this version
    versions = scratch / "versions.map"
    versions.write_text(f"{RUNTIME} {{ global: cuda*; __cuda*; stand_in_*; _ZN8stand_in*; local: *; }};\n")
    _link(folder / RUNTIME, *own, str(scratch / "missing.o"), f"-Wl,--version-script={versions}")
    _link(folder / DRIVER, objects["cuda"], str(folder / RUNTIME))


def _link(library: Path, *arguments: str) -> None:
    _run("g++", "-shared", f"-Wl,-soname,{library.name}", "-Wl,-z,defs", "-o", str(library), *arguments, "-ldl")


def _exported(library: Path, *options: str) -> set[str]:
    """The names of CUDA's functions that ``library`` defines."""
    lines = _run("nm", "--defined-only", *options, str(library)).splitlines()
    names = {line.split()[-1].partition("@")[0] for line in lines}
    return {name for name in names if name.startswith(("cuda", "__cuda"))}


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Ran:
    """How a command on the stand-in ended: what it printed, and what the device logged."""

    returncode: int
    stdout: str
    stderr: str
    log: str


@dataclass(frozen=True)
class StandIn:
    """Runs commands on the libraries in ``libraries``, with the stand-in for MPS's daemon on PATH. The devices of each
    command are its own, as is the folder in ``scratch`` that they write to."""

    libraries: Path
    scratch: Path

    def __call__(
        self,
        command: Sequence[str | Path],
        *,
        devices: int = 1,
        delays: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        timeout_s: float = 280,
    ) -> Ran:
        """Run ``command`` where there are ``devices`` GPUs.

        ``delays`` are seconds that functions of CUDA take, by their names; ``context`` is the making of a context, and
        ``cuInit`` the start. ``environment`` is added to this process's, and ``directory`` is
        where it runs.
        """
        folder = self.scratch / str(len(list(self.scratch.iterdir())))
        folder.mkdir()
        put_mps_programs(folder / "bin")
        paths = [HERE / "startup", PROJECT, PROJECT / "src", PROJECT / "scripts"]
        done = subprocess.run(
            list(map(str, command)),
            env={
                **os.environ,
                "LD_PRELOAD": " ".join(str(self.libraries / name) for name in (DRIVER, RUNTIME)),
                "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "SPLITWISER_STAND_IN_FOLDER": str(folder),
                "SPLITWISER_STAND_IN_DEVICES": str(devices),
                "SPLITWISER_STAND_IN_DELAY": ",".join(f"{name}={seconds}" for name, seconds in (delays or {}).items()),
                "TRITON_LIBCUDA_PATH": str(self.libraries),
                **(environment or {}),
            },
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        log = folder / "log"
        return Ran(done.returncode, done.stdout, done.stderr, log.read_text() if log.exists() else "")
