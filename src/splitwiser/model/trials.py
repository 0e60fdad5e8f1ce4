"""The trials of a model at load: what is tried, when logits count as the same, and what was found, which is remembered so
that the next load of the same model need not try again.

Remembered are successful trials on a CPU: that a model is served exactly, what its layers store, which fused modules compute
the same as its own, and whether padding changes its tokens. They follow from the model's code, configuration and weights and
from what computes them, all of which is in the key: this project's code, the compiled library where it takes part, the
versions of the packages, the source and the code of each class of module, the checkpoint's files (name, size, times and
inode) or the seed of dummy weights, the dtype, the processor, the number of threads, and settings of PyTorch and its
libraries. A file that cannot be read, or whose checksum is wrong, counts as none.

Tried at each load are a refused model, whose cause may be temporary (too little memory); everything on a GPU, whose kernels
depend on a driver and on Triton's own cache; and the layout of packed weights, which is read from memory that this process
has just written (:mod:`splitwiser.model.kernels.packed_linear`).
"""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig

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
# Relative to the largest logit: half precisions differ by rounding; a dropped term or a leak between requests by far more.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# tighter, since an error that grows with the position changes the logits of random weights only little
FAR_BOUNDS = {**BOUNDS, torch.float32: 1e-4}
# products of a batch round differently than those of a row, which adds up over the layers in half precisions; a wrong
# position is as far off as another prompt
PADDED_BOUNDS = {**{dtype: 3 * bound for dtype, bound in FAR_BOUNDS.items()}, torch.float32: 1e-4}


def agree(ours: Tensor | Sequence[Tensor], theirs: Tensor | Sequence[Tensor], bound: float) -> bool:
    """Return whether logits are the same, row by row, up to ``bound`` times the largest."""
    return all(
        bool((one - other).abs().max() <= bound * other.abs().max()) for one, other in zip(ours, theirs, strict=True)
    )


def logits_agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two tensors of logits, (rows, vocabulary) each, differ by no more than rounding in ``dtype`` does."""
    return agree(ours.float(), theirs.float(), BOUNDS[dtype])


def probe_prompts(model: LoadedModel) -> list[list[int]]:
    """Return two prompts of one length."""
    return [[(7 * number + 3) % model.vocabulary for number in range(start, start + 5)] for start in (0, 11)]


def padding_keeps_logits(model: LoadedModel, prompts: Sequence[list[int]]) -> bool:
    """Return whether transformers' own generation of two tokens gives ``prompts``, of different lengths, the same logits in
    one padded batch as each alone."""
    bound = PADDED_BOUNDS[model.dtype]
    alone = [_generated_logits(model, [prompt]) for prompt in prompts]
    together = _generated_logits(model, prompts)
    first, second = (agree(together[step], [each[step][0] for each in alone], bound) for step in (0, 1))
    # if rounding changed the first token, the second shows nothing
    same_token = [each[0][0].argmax() for each in alone] == list(together[0].argmax(dim=-1))
    return first and (second or not same_token)


def _generated_logits(model: LoadedModel, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Return the logits of two steps of transformers' own generation for a padded batch of ``prompts``, each float32 of
    shape (prompts, vocabulary)."""
    ids, mask = model.pad(prompts)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=2, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    generate = cast("Callable[..., Any]", model.module.generate)
    first, second = generate(input_ids=ids, attention_mask=mask, generation_config=config).logits
    return first.float(), second.float()


class Trial:
    """A trial of ``model`` called ``name``: what an earlier one found, and a place for what this one finds. The model must
    be as it was loaded; ``compiled`` says whether the compiled library takes part. ``outcome`` is made of JSON's types, None
    if nothing is known."""

    def __init__(self, model: LoadedModel, name: str, *, compiled: bool) -> None:
        self._path: Path | None = None
        self.outcome: Any = None
        if model.device.type != "cpu":
            return
        with suppress(OSError):
            facts = "\n".join(map(repr, _facts(model, name, compiled)))
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
    """Return ``find(model)``, of transformers' own forward, or what it has returned for the same key before."""
    trial = Trial(model, name, compiled=False)
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


def _facts(model: LoadedModel, name: str, compiled: bool) -> Iterator[object]:
    """Yield everything that the outcome of the trial ``name`` depends on."""
    yield name
    yield model.weights, model.dtype, model.vocabulary, model.max_positions
    yield model.module.config.to_json_string(use_diff=False)
    yield sorted(set(map(_identity, {type(part) for part in model.module.modules()})))
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            yield path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    if compiled:
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
