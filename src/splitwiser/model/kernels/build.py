"""Compiles the C++ kernels for CPUs: once per machine with its own compiler, then loaded from a cache. Without a compiler
PyTorch computes instead."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from splitwiser.errors import first_line
from splitwiser.machine.process import home_folder

SOURCES = tuple(sorted(Path(__file__).with_name("csrc").glob("*.cpp")))
HEADERS = tuple(sorted(Path(__file__).with_name("csrc").glob("*.h")))
FLAGS = ("-O3", "-funroll-loops", "-std=c++17", "-fopenmp", "-fPIC")
MARCH = "SPLITWISER_MARCH"  # an environment variable: the -march to compile for instead of this processor's
COMPILE_S = 120  # a few seconds are usual

_DECLARATIONS = Path(__file__).with_name("csrc") / "functions.h"
_TYPES = {"void": None, "int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def load_native() -> tuple[ctypes.CDLL | None, str]:
    """Return the compiled functions and a line for the run's record that says what compiled them; None and a line with
    the reason where they cannot be compiled or loaded."""
    compiler = shutil.which("g++")  # another compiler's OpenMP is not the one that PyTorch has loaded
    if compiler is None:
        return None, "plain PyTorch (no g++ on PATH)"
    try:
        library = _declare_functions(ctypes.CDLL(str(_build(compiler))))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
        return None, f"plain PyTorch (g++ failed: {lines[0]})"
    except subprocess.TimeoutExpired:
        return None, f"plain PyTorch (g++ took more than {COMPILE_S} s)"
    except OSError as error:
        return None, f"plain PyTorch (the compiled library cannot be used: {first_line(error)})"
    return library, f"compiled by {compiler}" + (f" for {march}" if (march := os.environ.get(MARCH)) else "")


def cache_directory() -> Path:
    """Return the folder of the compiled functions: ``$XDG_CACHE_HOME/splitwiser`` or ``~/.cache/splitwiser``. Raises
    FileNotFoundError for a user without a home folder."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "splitwiser"
    return home_folder("XDG_CACHE_HOME") / ".cache" / "splitwiser"


def _build(compiler: str) -> Path:
    """Return the path of the shared library, compiled unless the cache holds one of the same sources, flags, compiler and
    processor."""
    flags = (*FLAGS, f"-march={os.environ.get(MARCH) or 'native'}")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_S).stdout
    sources = [source.read_bytes() for source in (*SOURCES, *HEADERS)]
    identity = hashlib.sha256(b"\0".join([*sources, *map(str.encode, flags), version, processor_flags()]))
    library = cache_directory() / f"native-{identity.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [f"{scratch}/{source.stem}.o" for source in SOURCES]
        compiling = [
            [compiler, *flags, "-c", str(source), "-o", made] for source, made in zip(SOURCES, objects, strict=True)
        ]
        # linked without an OpenMP library: calls resolve to the one that PyTorch has loaded, and so use its threads
        for command in (*compiling, [compiler, "-shared", *objects, "-o", f"{scratch}/native.so"]):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_S)
        Path(scratch, "native.so").replace(library)  # atomic, should two runs build at the same time
    return library


def _declare_functions(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions of ``library`` the types that csrc/functions.h declares."""
    for result, name, parameters in re.findall(r"(\w+) (\w+)\(([^)]*)\);", _DECLARATIONS.read_text()):
        if function := getattr(library, name, None):  # some exist only where the processor has the instructions
            function.restype = _TYPES[result]
            function.argtypes = [
                ctypes.c_void_p if "*" in parameter else _TYPES[parameter.split()[0]]
                for parameter in parameters.split(",")
                if parameter
            ]
    return library


def processor_flags() -> bytes:
    """Return the line of /proc/cpuinfo that lists the processor's instruction set extensions; empty if there is none."""
    for line in Path("/proc/cpuinfo").read_bytes().splitlines():
        if line.startswith((b"flags", b"Features")):
            return line
    return b""
