"""The C++ functions are built once, cached, and done without where they cannot be had."""

import ctypes
import os
import re
import shutil
from pathlib import Path

import pytest

from splitwiser.model.kernels import build as native
from splitwiser.model.kernels.build import load_native

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "splitwiser"


def fake_compiler(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a ``g++`` on PATH that runs ``script``."""
    compiler = directory / "g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


@pytest.fixture
def short_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of all sources, which every test of a kernel has compiled: one that takes no time."""
    source = tmp_path / "short.cpp"
    source.write_text('extern "C" int first(void) { return 1; }\n')
    monkeypatch.setattr(native, "SOURCES", (source,))
    return source


@needs_compiler
@pytest.mark.usefixtures("short_source")
def test_is_built_once(cache: Path) -> None:
    assert load_native()[0] is not None
    (built,) = cache.iterdir()
    made_ns = built.stat().st_mtime_ns
    assert load_native()[0] is not None
    assert built.stat().st_mtime_ns == made_ns


@needs_compiler
def test_every_function_has_its_declared_types() -> None:
    library, _ = load_native()
    assert library is not None
    sources = "".join(source.read_text() for source in native.SOURCES)
    names = re.findall(r'^extern "C" \w+ (\w+)\(', sources, re.MULTILINE)
    assert {"attention", "store", "rms_norm"} <= set(names)
    functions = [function for name in names if (function := getattr(library, name, None))]
    assert all(function.argtypes is not None for function in functions)
    assert library.rms_norm.argtypes == [*[ctypes.c_void_p] * 3, *[ctypes.c_float] * 2, *[ctypes.c_int64] * 3]
    assert library.rms_norm.restype is None


@needs_compiler
def test_a_changed_source_is_built_anew(cache: Path, short_source: Path) -> None:
    load_native()
    short_source.write_text(short_source.read_text() + "\n// changed\n")
    load_native()
    assert len(list(cache.iterdir())) == 2


@needs_compiler
@pytest.mark.usefixtures("short_source")
def test_another_instruction_set_is_built_beside(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.MARCH, raising=False)
    load_native()
    for given, said in (("", "g++"), ("native", "g++ for native")):
        monkeypatch.setenv(native.MARCH, given)
        assert load_native()[1].endswith(said)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setenv(native.MARCH, "none-such")
    library, described = load_native()
    assert library is None
    assert "none-such" in described
    assert len(list(cache.glob("*.so"))) == 1


def test_the_compiler_is_told_the_instruction_set(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, f'test "$1" = --version && exit 0; echo "$@" >> {tmp_path}/calls; exit 1', monkeypatch)
    for given, told in (("", "-march=native"), ("x86-64-v3", "-march=x86-64-v3")):
        monkeypatch.setenv(native.MARCH, given)
        load_native()
        assert told in (tmp_path / "calls").read_text().splitlines()[-1].split()
    assert list(cache.glob("*.so")) == []


def test_without_a_compiler_plain_pytorch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_native() == (None, "plain PyTorch (no g++ on PATH)")


def test_a_compiler_that_fails_is_named_and_not_called_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'test "$1" = --version && exit 0; echo "x.cpp:1: error: no such thing" >&2; echo >> calls; exit 1'
    fake_compiler(tmp_path, script.replace("calls", f"{tmp_path}/calls"), monkeypatch)
    described = load_native()
    (kept,) = cache.iterdir()
    assert described == (
        None,
        f"plain PyTorch (g++ failed: x.cpp:1: error: no such thing; delete {kept} to try again)",
    )
    assert load_native() == described
    assert len((tmp_path / "calls").read_text()) == 1
    kept.unlink()
    assert load_native() == described
    assert len((tmp_path / "calls").read_text()) == 2


def test_a_compiler_that_hangs_is_given_up(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, "exec sleep 60", monkeypatch)
    monkeypatch.setattr(native, "COMPILE_S", 0.2)
    assert load_native() == (None, "plain PyTorch (g++ took more than 0.2 s)")
    assert not cache.exists()


def test_a_library_that_cannot_be_loaded_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_compiler(tmp_path, 'for last; do :; done; test "$1" = --version || echo junk > "$last"', monkeypatch)
    library, described = load_native()
    assert library is None
    assert described.startswith("plain PyTorch (the compiled library cannot be used: ")


def test_a_cache_that_cannot_be_written_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fake_compiler(tmp_path, "exit 0", monkeypatch)
    library, described = load_native()
    assert library is None
    assert "cannot be used" in described


@needs_compiler
def test_a_cache_that_others_can_write_to_is_not_used(cache: Path) -> None:
    cache.mkdir(mode=0o755)
    cache.chmod(0o777)
    library, described = load_native()
    assert library is None
    assert f"{cache} can be written to by other users" in described
    assert list(cache.iterdir()) == []


@needs_compiler
@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder_plain_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    reason = "there is no home folder to keep it; set XDG_CACHE_HOME"
    assert load_native() == (None, f"plain PyTorch (the compiled library cannot be used: {reason})")
