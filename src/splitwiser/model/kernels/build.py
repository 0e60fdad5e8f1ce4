"""Compiles the C++ kernels for CPUs: once per machine with its own compiler, then loaded from a cache. Without a compiler
PyTorch computes instead."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from splitwiser.errors import first_line
from splitwiser.files import replace
from splitwiser.machine.user_cache import cache_directory

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
    except _CompilerError as error:
        return None, f"plain PyTorch ({error})"
    except OSError as error:
        return None, f"plain PyTorch (the compiled library cannot be used: {first_line(error)})"
    return library, f"compiled by {compiler}" + (f" for {march}" if (march := os.environ.get(MARCH)) else "")


class _CompilerError(Exception):
    """The compiler failed; the message says how."""


def _build(compiler: str) -> Path:
    """Return the path of the shared library, compiled unless the cache holds one of the same sources, flags, compiler and
    processor. The cache also keeps why the compiler failed, so that not every start waits for it to fail again."""
    flags = (*FLAGS, f"-march={os.environ.get(MARCH) or 'native'}")
    version = _call([compiler, "--version"]).encode()
    sources = [source.read_bytes() for source in (*SOURCES, *HEADERS)]
    identity = hashlib.sha256(b"\0".join([*sources, *map(str.encode, flags), version, processor_flags()]))
    library = cache_directory() / f"native-{identity.hexdigest()[:16]}.so"
    failure = library.with_suffix(".failed")
    if library.exists():
        return library
    if failure.exists():
        raise _CompilerError(failure.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [f"{scratch}/{source.stem}.o" for source in SOURCES]
        try:
            for source, made in zip(SOURCES, objects, strict=True):
                _call([compiler, *flags, "-c", str(source), "-o", made])
            # linked without an OpenMP library: calls resolve to the one that PyTorch has loaded, and so use its threads
            _call([compiler, "-shared", *objects, "-o", f"{scratch}/native.so"])
        except _CompilerError as error:
            reason = f"{error}; delete {failure} to try again"
            replace(failure, reason)
            raise _CompilerError(reason) from error
        Path(scratch, "native.so").replace(library)  # atomic, should two runs build at the same time
    return library


def _call(command: Sequence[str]) -> str:
    """Return what the compiler prints. Raises :class:`_CompilerError`."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_S).stdout
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
        raise _CompilerError(f"g++ failed: {lines[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise _CompilerError(f"g++ took more than {COMPILE_S} s") from error


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


def processor_kind() -> list[str]:
    """Return the lines of /proc/cpuinfo that tell one kind of processor from another."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    kinds = ("vendor_id", "cpu family", "model", "stepping", "cache size", "flags", "Features", "CPU ")
    return [line for line in lines if line.startswith(kinds)]
