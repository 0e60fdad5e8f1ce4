"""A checkpoint's files: checks before they are loaded, which read no weights, and what its generation settings mean here."""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer, get_hf_quantizer

from splitwiser.errors import first_line
from splitwiser.model.checkpoints.catalog import CatalogEntry
from splitwiser.model.checkpoints.hub import find_file
from splitwiser.text import shorten

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
# Generation settings that change no token here: special tokens, lengths, how it is computed and reported, and what each
# request sets itself. Of the others, no mode applies more than own_sampling has; a note tells the user.
_CHANGES_NO_TOKEN = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "max_time",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "compile_config", "disable_compile", "continuous_batching_config", "low_memory",
    "prefill_chunk_size", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "transformers_version",
}  # fmt: skip
_NEUTRAL: dict[str, object] = GenerationConfig._get_default_generation_params() | {"guidance_scale": 1.0}
_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p")


def describe_files(entry: CatalogEntry) -> str:
    """Return a text that changes when a file of the model on this machine changes: each file's name, size, times and
    inode."""
    config = find_file(entry, "config.json")
    files = [entry.gguf] if entry.gguf else sorted(config.parent.iterdir()) if config else []
    stats = [(path.name, path.stat()) for path in files if path.is_file()]
    return str([(name, each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino) for name, each in stats])


def find_checkpoint_problem(entry: CatalogEntry, config: PreTrainedConfig, device: torch.device) -> str | None:
    """Return why no model can be loaded onto ``device`` from the files on this machine, in one line that names the file;
    None if one can, or if there are no files yet."""
    return (
        find_quantisation_problem(entry, config, device) or find_weights_problem(entry) or _find_settings_problem(entry)
    )


def find_pointer(entry: CatalogEntry, names: Sequence[str]) -> str | None:
    """Return one line about the first of the model's files ``names`` that is a Git LFS pointer; None if none of those on
    this machine is."""
    paths = filter(None, (find_file(entry, name) for name in names))
    return next(filter(None, map(_pointer_problem, paths)), None)


def find_weights_problem(entry: CatalogEntry) -> str | None:
    """Return why the weights on this machine cannot be read, in one line that names the file; None if they can, or if those
    of a model of the hub are not downloaded yet."""
    if entry.gguf:  # check_gguf has looked at it
        return None
    first = next((path for name in WEIGHT_FILES if (path := find_file(entry, name))), None)
    if first is None:
        return f"model {entry.name}: no weights in {entry.location}" if entry.path else None
    return next((f"model {entry.name}: {problem}" for problem in _problems(entry, first)), None)


def find_quantisation_problem(entry: CatalogEntry, config: PreTrainedConfig, device: torch.device) -> str | None:
    """Return why weights quantised as in ``config`` cannot be loaded onto ``device``, in one line; None if they can or are
    not quantised."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    try:
        if not AutoHfQuantizer.supports_quant_method(given):
            raise ValueError("transformers does not know the method")
        get_hf_quantizer(config, None, {"": device}, weights_only=True, user_agent={})
    except Exception as error:  # a missing library, an unknown method, an unsupported device
        how = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
        return (
            f"model {entry.name}: its weights are quantised ({getattr(how, 'value', how) or 'method not named'}), which "
            f"cannot be loaded here: {first_line(error)}"
        )
    return None


def find_eos_problem(settings: PreTrainedConfig | GenerationConfig) -> str | None:
    """Return what is wrong with the end-of-sequence tokens in ``settings``; None if they are token ids, or not given."""
    given = getattr(settings, "eos_token_id", None)
    listed = given if isinstance(given, list) else [given]
    if given is None or all(isinstance(each, int) for each in listed):
        return None
    return f"eos_token_id must be a token id or a list of them, not {shorten(given)}"


def _find_settings_problem(entry: CatalogEntry) -> str | None:
    path = find_file(entry, "generation_config.json")
    try:
        problem = find_eos_problem(GenerationConfig.from_pretrained(path.parent)) if path else None
        return problem and f"model {entry.name}: {path}: {problem}"
    except OSError:  # transformers ignores a file that is not JSON
        return None
    except Exception as error:  # JSON of another form raises various errors
        return f"model {entry.name}: {path}: invalid generation settings: {type(error).__name__}: {first_line(error)}"


def _problems(entry: CatalogEntry, first: Path) -> Iterator[str | None]:
    if first.suffix != ".json":
        yield from filter(None, [_file_problem(first)])
        return
    try:
        names = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield _pointer_problem(first) or f"{first}: not an index that maps each weight to a file"
        return
    for name in names:
        path = find_file(entry, str(name))
        if path is None and entry.path:
            yield f"{first} names {name}, which is missing"
        elif path is not None:
            yield from filter(None, [_file_problem(path)])


def _file_problem(path: Path) -> str | None:
    if problem := _pointer_problem(path):
        return problem
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return None
        except Exception as error:  # SafetensorError derives from Exception alone
            return f"{path}: cannot be opened as safetensors, or is truncated: {first_line(error)}"
    with path.open("rb") as file:
        start = file.read(2)
    if zipfile.is_zipfile(path) or start[:1] == b"\x80":  # PyTorch's format since 1.6, and the one before
        return None
    return f"{path}: not a PyTorch checkpoint, or truncated"


def _pointer_problem(path: Path) -> str | None:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return f"{path}: a Git LFS pointer instead of the file; fetch it with git lfs pull"
    return None


def own_sampling(generation: GenerationConfig | None) -> dict[str, Any]:
    """Return the parameters of :class:`~splitwiser.request.SamplingParams` by which ``model.generate`` would choose tokens
    if it were given none: the repetition penalty, and how tokens are drawn if the settings say that they are."""
    if generation is None:
        return {}
    of_generate = ["repetition_penalty", *(_OF_DRAWING if generation.do_sample else ())]
    given = {name: getattr(generation, name) for name in of_generate}
    own = {name: _NEUTRAL.get(name) if value is None else value for name, value in given.items()}
    if own["repetition_penalty"] == 1:
        del own["repetition_penalty"]
    return {name: value for name, value in own.items() if value is not None}


def unapplied_settings(generation: GenerationConfig | None) -> list[str]:
    """Return a note of the settings that would change tokens and that no mode applies, or none."""
    given = generation.to_diff_dict() if generation else {}
    settings = [
        f"{name}={value}"
        for name, value in sorted(given.items())
        if name not in {*_CHANGES_NO_TOKEN, *own_sampling(generation)}
        and not name.startswith("_")
        and value not in (None, [], {}, _NEUTRAL.get(name))
    ]
    if not settings:
        return []
    return [f"the checkpoint's generation settings are not applied, in any mode: {', '.join(settings)}"]


def describe_own_sampling(own: Mapping[str, Any], choice: str) -> list[str]:
    """Return a note of the parameters ``own`` of a checkpoint and of what becomes of them by ``--generation_config``, or
    none if it has none."""
    if not own:
        return []
    named = ", ".join(f"{name}={value}" for name, value in own.items())
    if choice == "checkpoint":
        return [f"parameters that a request leaves at their default are the checkpoint's own: {named}"]
    return [f"the checkpoint's own sampling is not applied: {named}; generation_config checkpoint does"]
