"""Loads an unmodified model of transformers: a checkpoint, or its architecture with random weights."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from splitwiser import constants
from splitwiser.errors import InputError, UnsupportedModelError, first_line
from splitwiser.machine.memory import free_memory
from splitwiser.model.checkpoints.catalog import EMBEDDED_MODEL, CatalogEntry, Kind, resolve_model
from splitwiser.model.checkpoints.checkpoint import describe_files, own_sampling, unapplied_settings
from splitwiser.model.checkpoints.configuration import DTYPES, plan_model
from splitwiser.model.checkpoints.gguf_file import describe_conversion, read_header
from splitwiser.model.checkpoints.tokenizer import has_tokenizer_files, load_tokenizer
from splitwiser.model.checkpoints.weights import draw_weights, read_weights, weights_nbytes, without_memory
from splitwiser.model.kv_pool import find_memory_problem
from splitwiser.model.rotary import last_length, length_computed_anew, rotary_parameters
from splitwiser.request import Adapter

LoadFormat = Literal["auto", "dummy"]

# what configurations call the number of positions, and the length that a model without a limit was trained with
_LIMITS = ("max_position_embeddings", "max_seq_len", "seq_length")
_UNLIMITED = {"bloom": 2048}


@dataclass
class LoadedModel:
    """A model on its device with what is needed to serve it. ``parameters`` is the number of its weights, tied ones counted
    once, and ``weights`` says which they are: the seed that they were drawn with, or the files that they were read from,
    and those of ``adapters``, which requests may name;
    ``tokenizer`` is None if it has none that can be loaded, and ``no_text`` then says why prompts cannot be text.
    ``computed_anew_at`` is the length at which a request's K and V are computed anew
    (:func:`splitwiser.model.rotary.length_computed_anew`). An encoder-decoder's answers begin with ``start_token_id``, which
    is not among their tokens; a decoder has none. ``own_sampling`` has the sampling parameters of its generation
    settings."""

    name: str
    module: PreTrainedModel
    parameters: int
    weights: str
    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device
    dtype: torch.dtype
    load_format: LoadFormat
    load_s: float
    eos_token_ids: frozenset[int]
    max_positions: int | None
    computed_anew_at: int | None = None
    own_sampling: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    no_text: str = ""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    start_token_id: int | None = None

    @property
    def kind(self) -> Kind:
        """What the model consists of."""
        return "decoder" if self.start_token_id is None else "encoder-decoder"

    @property
    def encodes(self) -> bool:
        """Whether prompts are read as a whole by an encoder."""
        return self.kind == "encoder-decoder"

    def pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return the token ids of ``prompts`` as a padded batch for transformers' own generation, and its mask (1: token, 0:
        padding), each int64 of shape (prompts, longest prompt). A decoder's are padded on the left; an encoder's on the
        right, since its positions count from the first token, padding or not."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            own = slice(len(prompt)) if self.encodes else slice(width - len(prompt), None)
            ids[row, own] = torch.tensor(prompt)
            mask[row, own] = 1
        return ids.to(self.device), mask.to(self.device)

    def positions_needed(self, prompt_tokens: int, new_tokens: int) -> int:
        """Return how many positions a request takes: a decoder's answer goes on behind the prompt, and its last token needs
        none; an encoder-decoder's has positions of its own."""
        return max(prompt_tokens, new_tokens) if self.encodes else prompt_tokens + new_tokens - 1

    @property
    def longest_request(self) -> int | None:
        """See :func:`longest_request`."""
        return longest_request(self.max_positions, self.encodes)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model has embeddings for."""
        weight = self.module.get_input_embeddings().weight
        return len(weight) if isinstance(weight, Tensor) else 0

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Token ids that stand for no text: end and begin of sequence, padding and the tokenizer's special tokens."""
        config = self.module.config.get_text_config()
        named = (getattr(config, name, None) for name in ("bos_token_id", "pad_token_id"))
        of_tokenizer = self.tokenizer.all_special_ids if self.tokenizer else []
        return self.eos_token_ids.union(of_tokenizer, (each for each in named if isinstance(each, int)))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ``token_ids`` without special tokens; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def write_chat(self, messages: Sequence[dict[str, str]], where: str) -> str:
        """Return ``messages``, each with ``role`` and ``content``, as the text that the model answers: written by its chat
        template, special tokens included. Raises :class:`InputError`, beginning with ``where``, if it has no template or
        the template refuses the messages."""
        if self.tokenizer is None:
            raise InputError(f"{where}: {self.no_text}")
        if not self.tokenizer.chat_template:
            raise InputError(f"{where}: {self.name} has no chat template; give a prompt, or a model made for chats")
        try:
            made = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs, which also raise errors of their own
            raise InputError(f"{where}: {self.name}'s chat template refuses it: {first_line(error)}") from error
        return str(made)


def load_model(
    model: str | Path,
    *,
    models: str | Path = constants.MODELS,
    dtype: str,
    device: str,
    load_format: str,
    seed: int = constants.SEED,
    kv_memory: str = "auto",
    weights: bool = True,
) -> LoadedModel:
    """Load ``model`` (a name of the file ``models``, a checkpoint directory, a GGUF file or a hub id) onto ``device``.

    ``load_format`` ``auto`` reads its weights; ``dummy`` builds the architecture alone with random weights drawn with
    ``seed``, and uses the embedded model's tokenizer if the model's own is not on this machine. The attention
    implementation stays transformers' own; see :func:`splitwiser.model.compatibility.attach_engine`. The sizes of the
    weights and of a KV pool of size ``kv_memory`` are compared with the free memory before any weight is allocated. If
    not ``weights``, the module has no memory; only its tokenizer, vocabulary and positions are known. Raises
    :class:`InputError`, and its subclass :class:`UnsupportedModelError` for a model that cannot be served.
    """
    began = time.perf_counter()
    entry, place, config, weights_dtype = plan_model(
        model, models=models, dtype=dtype, device=device, load_format=load_format
    )
    notes = _widened(config, weights_dtype) if load_format == "auto" else []
    module = without_memory(entry, config, weights_dtype)
    problem = find_memory_problem(
        entry.name, weights_nbytes(module), module.dtype, kv_memory, free_memory(place), place
    )
    if weights and problem:  # before the system kills the process for it
        raise InputError(problem)
    if weights and load_format == "dummy":
        draw_weights(module, place, seed)
    elif weights:
        reading = time.perf_counter()
        module = read_weights(entry, config, weights_dtype, place)
        if entry.gguf:
            notes += describe_conversion(read_header(entry.gguf), config, module.dtype, time.perf_counter() - reading)
        if module.dtype not in DTYPES.values():
            raise UnsupportedModelError(f"model {entry.name}: its weights are {module.dtype}, which is not served")
    notes += unapplied_settings(module.generation_config)
    own = own_sampling(module.generation_config)
    tokenizer, no_text = load_tokenizer(entry, local_only=load_format == "dummy")
    if has_tokenizer_files(entry) and no_text:
        notes.append(no_text)
    if tokenizer is None and load_format == "dummy":
        tokenizer, no_text = load_tokenizer(resolve_model(EMBEDDED_MODEL), local_only=True)
        notes.append(f"text is tokenised by {EMBEDDED_MODEL}'s tokenizer: {entry.name}'s own is not on this machine")
    eos = _eos_token_ids(module, tokenizer if load_format == "auto" else None)
    start_token_id = _start_token_id(entry, module)
    # a new one, so that mode generate applies no setting that the engine does not: no end-of-sequence token either, since
    # transformers would end a row at it even if the request ignores it
    module.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=start_token_id)
    return LoadedModel(
        name=entry.name,
        module=module.eval().requires_grad_(False),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        weights=f"drawn with seed {seed}" if load_format == "dummy" else describe_files(entry),
        tokenizer=tokenizer,
        device=place,
        dtype=module.dtype,
        load_format="dummy" if load_format == "dummy" else "auto",
        load_s=time.perf_counter() - began,
        eos_token_ids=eos,
        max_positions=max_positions(module.config),
        computed_anew_at=length_computed_anew(module.config),
        own_sampling=own,
        notes=notes,
        no_text=no_text,
        start_token_id=start_token_id,
    )


def _eos_token_ids(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    for source in (module.generation_config, module.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def _start_token_id(entry: CatalogEntry, module: PreTrainedModel) -> int | None:
    """Return the token that an encoder-decoder's answers begin with, None for a decoder. Raises
    :class:`UnsupportedModelError` if the checkpoint names none."""
    if not module.config.is_encoder_decoder:
        return None
    for name in ("decoder_start_token_id", "bos_token_id"):
        for source in (module.generation_config, module.config):
            if isinstance(token := getattr(source, name, None), int):
                return token
    raise UnsupportedModelError(
        f"model {entry.name}: its configuration names no decoder_start_token_id, the token that answers begin with"
    )


def _widened(config: PreTrainedConfig, dtype: torch.dtype) -> list[str]:
    stored = config.dtype
    if not isinstance(stored, torch.dtype) or stored.itemsize >= dtype.itemsize:
        return []
    names = [str(each).removeprefix("torch.") for each in (stored, dtype)]
    return [
        f"the weights are stored as {names[0]} and run as {names[1]}, which takes {dtype.itemsize // stored.itemsize} times "
        "the memory; dtype auto keeps their own"
    ]


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions that the model supports, or None if it has no limit. A model with dynamic NTK states
    the length that it was trained for, which the scaling multiplies."""
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in _LIMITS)
    limit: int | None = next(filter(None, named), _UNLIMITED.get(text.model_type))
    factors = [each["factor"] for each in rotary_parameters(config) if each.get("rope_type") == "dynamic"]
    limit = int(limit * max(factors)) if limit and factors else limit
    return min(filter(None, (limit, last_length(config))), default=None)


def longest_request(positions: int | None, encodes: bool) -> int | None:
    """Return the largest number of tokens of a request in the KV pool, None if there is no limit: as many as the model has
    ``positions`` or, if it ``encodes``, as many for the source and as many for the answer."""
    return None if positions is None else (1 + encodes) * positions
