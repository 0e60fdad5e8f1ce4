"""Remembers what the trials of a model at load found, so that the next load of the same model need not try again.

Remembered are successful trials on a CPU: that a model is served exactly, what its layers store, which fused modules compute
the same as its own, and whether padding changes its tokens. They follow from the model's code, configuration and weights and
from what computes them, all of which is in the key: this project's code, the compiled library, the versions of the packages,
the source and the code of each class of module, the checkpoint's files (name, size, times and inode) or the seed of dummy
weights, the dtype, the processor, the number of threads, and settings of PyTorch and its libraries. A file that cannot be
read, or whose checksum is wrong, counts as none.

Tried at each load are a refused model, whose cause may be temporary (too little memory); everything on a GPU, whose kernels
depend on a driver and on Triton's own cache; and the layout of packed weights, which is read from memory that this process
has just written (:mod:`splitwiser.model.kernels.packed_linear`).
"""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from splitwiser.files import replace
from splitwiser.machine.user_cache import cache_directory
from splitwiser.model.kernels.build import load_native
from splitwiser.model.loading import LoadedModel

KEPT = 200  # outcomes at most; the oldest go first
SETTINGS = (
    "ATEN_",
    "DNNL_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "PYTORCH_",
    "SPLITWISER_",
    "TORCH_",
)


class Trial:
    """A trial of ``model`` called ``name``: what an earlier one found, and a place for what this one finds. The model must
    be as it was loaded. ``outcome`` is made of JSON's types, None if nothing is known."""

    def __init__(self, model: LoadedModel, name: str) -> None:
        self._path: Path | None = None
        self.outcome: Any = None
        if model.device.type != "cpu":
            return
        with suppress(OSError):
            facts = "\n".join(map(repr, _facts(model, name)))
            self._path = cache_directory() / "trials" / f"{hashlib.sha256(facts.encode()).hexdigest()}.json"
            self.outcome = _read(self._path)

    def remember(self, outcome: object) -> None:
        """Keep ``outcome`` for the next trial with the same key, if the cache can be written."""
        if self._path is None:
            return
        text = json.dumps(outcome)
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            replace(self._path, f"{_checksum(text)}\n{text}")
            for old in sorted(self._path.parent.glob("*.json"), key=_modified_ns)[:-KEPT]:
                old.unlink(missing_ok=True)


def remembered_flag(model: LoadedModel, name: str, find: Callable[[LoadedModel], bool]) -> bool:
    """Return ``find(model)``, or what it has returned for the same key before."""
    trial = Trial(model, name)
    if not isinstance(trial.outcome, bool):
        trial.outcome = find(model)
        trial.remember(trial.outcome)
    return bool(trial.outcome)


def _read(path: Path) -> object:
    try:
        checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
        return json.loads(text) if checksum == _checksum(text) else None
    except (OSError, ValueError):
        return None


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _modified_ns(path: Path) -> int:
    with suppress(OSError):  # another process may have removed it
        return path.stat().st_mtime_ns
    return 0


def _facts(model: LoadedModel, name: str) -> Iterator[object]:
    """Yield everything that the outcome of the trial ``name`` depends on."""
    yield name
    yield model.weights, model.dtype, model.vocabulary, model.max_positions
    yield model.module.config.to_json_string(use_diff=False)
    yield sorted(set(map(_identity, {type(part) for part in model.module.modules()})))
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            yield path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    library, described = load_native()
    yield library and library._name, described
    yield platform.python_version(), transformers.__version__, torch.__version__, torch.version.git_version
    yield platform.release(), _processor()
    yield torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    yield torch._C._get_mkldnn_enabled(), torch.__config__.show()
    yield sorted((key, value) for key, value in os.environ.items() if key.startswith(SETTINGS))


def _identity(kind: type[nn.Module]) -> tuple[object, ...]:
    """Return what identifies the code of a class of module: its name, its source file, and the code that runs, which a
    program may have replaced."""
    path = getattr(sys.modules.get(kind.__module__), "__file__", None)
    stat = Path(path).stat() if path else None
    code = getattr(kind.forward, "__code__", None)
    return (
        f"{kind.__module__}.{kind.__qualname__}",
        (path, stat.st_size, stat.st_mtime_ns) if stat else None,
        (code.co_code, code.co_filename, code.co_firstlineno) if code else repr(kind.forward),
    )


def _processor() -> list[str]:
    """Return the lines of /proc/cpuinfo that tell one kind of processor from another."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    kinds = ("vendor_id", "cpu family", "model", "stepping", "cache size", "flags", "Features", "CPU ")
    return [line for line in lines if line.startswith(kinds)]
