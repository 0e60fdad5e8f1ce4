"""GGUF files: what one says about itself, read without its weights, and what transformers' conversion of it leaves out.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from splitwiser.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SUFFIX = ".gguf"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}  # type numbers of tensors that are not quantised
_ALIGNMENT = 32  # of the weights, unless the file gives another

# How vocabularies of byte pairs split a text before they merge bytes, by the names that llama.cpp gives these rules.
# transformers takes the rule of GPT-2 for all that it does not know; this one differs by taking each digit apart.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "roberta-bpe", "exaone4", "granite-docling"}


@dataclass(frozen=True)
class GgufHeader:
    """Metadata of a GGUF file, arrays as their number of entries; and name, type number, number of values and offset of
    each tensor, the offset in bytes from ``data_start``, the position of the weights in the file."""

    metadata: Mapping[str, Any]
    tensors: tuple[tuple[str, int, int, int], ...]
    data_start: int

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file has a vocabulary."""
        return "tokenizer.ggml.tokens" in self.metadata

    @property
    def split_rule(self) -> str | None:
        """The rule by which a text is split before bytes are merged; None for a vocabulary that is not of merged bytes."""
        rule = self.metadata.get("tokenizer.ggml.pre", "not named")
        return rule if self.metadata.get("tokenizer.ggml.model") == "gpt2" else None

    @property
    def dtype(self) -> str | None:
        """The number format of weights that are not quantised: a half precision, beside which norms are float32, or else
        float32. None if some are quantised."""
        kinds = {kind for _, kind, _, _ in self.tensors}
        return next((_PLAIN[kind] for kind in (30, 1, 0) if kind in kinds), None) if kinds <= set(_PLAIN) else None


def is_gguf(path: str | Path) -> bool:
    """Return whether ``path`` is named as GGUF files are."""
    return Path(path).suffix.lower() == SUFFIX


def read_header(path: Path) -> GgufHeader:
    """Read the metadata and the table of tensors of ``path``. Raises :class:`UnsupportedModelError` for a file that is none
    of this format, is cut within these, or is one part of several."""
    try:
        with path.open("rb") as file:
            header = _read_header(file)
    except OSError as error:
        raise UnsupportedModelError(f"model {path}: cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, LookupError, ArithmeticError, TypeError, MemoryError) as error:
        raise UnsupportedModelError(f"model {path}: not a GGUF file of version 2 or 3, or truncated") from error
    if header.metadata.get("split.count", 1) > 1:
        raise UnsupportedModelError(
            f"model {path}: is one of {header.metadata['split.count']} parts, which transformers does not read; join them "
            "with llama-gguf-split --merge"
        )
    return header


def check_gguf(path: Path) -> None:
    """Raise :class:`UnsupportedModelError` if transformers could not read ``path`` here: see :func:`read_header`, for a file
    that is shorter than its header says, and where the package gguf is missing."""
    header = read_header(path)
    if find_spec("gguf") is None:
        raise UnsupportedModelError(f"model {path}: reading it needs the 'gguf' package; pip install gguf")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    end = 0
    for name, kind, values, offset in header.tensors:
        if kind not in set(GGMLQuantizationType):
            raise UnsupportedModelError(
                f"model {path}: tensor {name} has a number format that the package gguf does not know, {kind}"
            )
        block_values, block_nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        end = max(end, header.data_start + offset + values // block_values * block_nbytes)
    size = path.stat().st_size
    if size < end:
        raise UnsupportedModelError(f"model {path}: truncated: it has {size:,} of {end:,} bytes")


def add_missing_settings(config: "PreTrainedConfig", header: GgufHeader) -> None:
    """Set what transformers leaves out of the ``config`` of a GGUF file: the second token that may end an answer, and the
    number format of weights that are not quantised."""
    import torch

    end, other = (header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    if other is not None and other != end:
        config.eos_token_id = [each for each in (end, other) if each is not None]
    if header.dtype:
        config.dtype = getattr(torch, header.dtype)


def describe_conversion(
    header: GgufHeader, config: "PreTrainedConfig", dtype: "torch.dtype", seconds: float
) -> list[str]:
    """Return notes for a run's record: what was converted to ``dtype``, in how many ``seconds``, and in what the result may
    differ from the model that the file was made of."""
    to = str(dtype).removeprefix("torch.")
    notes = [
        f"the weights are {_types(header)} in a GGUF file, and were converted to {to} in {seconds:.1f} s at this load"
    ]
    scaled = any(name.startswith(("rope_freqs", "rope_factors")) for name, *_ in header.tensors)
    named = any(key.endswith("rope.scaling.type") and value != "none" for key, value in header.metadata.items())
    rope = getattr(config, "rope_parameters", None) or {}
    if (scaled or named) and rope.get("rope_type", "default") == "default":
        notes.append(
            "transformers leaves out how the file scales rotary positions, so the model's own tokens may be others"
        )
    if (rule := _unknown_split(header)) is not None:
        notes.append(f"transformers does not know how the file splits text ({rule}), so text may be given other tokens")
    return notes


def complete_tokenizer(tokenizer: "PreTrainedTokenizerBase", header: GgufHeader) -> None:
    """Set what transformers leaves out of the ``tokenizer`` of a GGUF file: how text is split, special tokens and the
    longest text."""
    from tokenizers import pre_tokenizers

    metadata = header.metadata
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    longest = metadata.get(f"{metadata['general.architecture']}.context_length")
    tokenizer.model_max_length = longest or tokenizer.model_max_length
    if header.split_rule in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _unknown_split(header: GgufHeader) -> str | None:
    """Return the rule by which the file splits text if neither transformers nor this module knows it."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    known = {*_AS_GPT2, *_DIGITS_APART, *getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", ())}
    return header.split_rule if header.split_rule not in known else None


def _types(header: GgufHeader) -> str:
    """Return the number formats of the weights, the one of most values first, such as ``Q4_1, Q8_0 and F32``."""
    from gguf import GGMLQuantizationType

    values: Counter[str] = Counter()
    for _, kind, count, _ in header.tensors:
        values[GGMLQuantizationType(kind).name] += count
    *names, last = [name for name, _ in values.most_common()]
    return f"{', '.join(names)} and {last}" if names else last


def _read_header(file: BinaryIO) -> GgufHeader:
    if file.read(4) != _MAGIC or _number(file, "I") not in _VERSIONS:
        raise ValueError("not a GGUF file")
    tensor_count, metadata_count = _number(file, "Q"), _number(file, "Q")
    metadata = {}
    for _ in range(metadata_count):
        key = _text(file)
        metadata[key] = _value(file, _number(file, "I"))
    tensors = []
    for _ in range(tensor_count):
        name = _text(file)
        shape = [_number(file, "Q") for _ in range(_number(file, "I"))]
        tensors.append((name, _number(file, "I"), prod(shape), _number(file, "Q")))
    if "general.architecture" not in metadata:
        raise ValueError("no architecture")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    return GgufHeader(metadata, tuple(tensors), -(-file.tell() // alignment) * alignment)


def _number(file: BinaryIO, code: str) -> Any:  # noqa: ANN401  # an int, float or bool, by its code
    layout = struct.Struct(f"<{code}")
    return layout.unpack(file.read(layout.size))[0]


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    found = file.read(length)
    if len(found) < length:
        raise ValueError("truncated")
    return found.decode(errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:  # noqa: ANN401  # of the type that the file says
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _number(file, _NUMBERS[kind])
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner == _STRING:
        for _ in range(count):
            file.seek(_number(file, "Q"), 1)
    elif inner in _NUMBERS:
        file.seek(count * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
    else:
        raise ValueError("arrays of arrays are not part of any model")
    return count
