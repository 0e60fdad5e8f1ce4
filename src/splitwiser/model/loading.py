"""Loads an unmodified model of transformers: a checkpoint, or its architecture with random weights."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from splitwiser import constants
from splitwiser.errors import InputError, UnsupportedModelError, first_line, unknown_name
from splitwiser.machine.device import resolve_device
from splitwiser.machine.memory import free_memory
from splitwiser.model.catalog import EMBEDDED_MODEL, CatalogEntry, check_model, encoder_decoder, resolve_model
from splitwiser.model.checkpoint import describe_files, find_checkpoint_problem, find_eos_problem
from splitwiser.model.dtypes import SPELLINGS, dtype_name
from splitwiser.model.gguf_file import add_missing_settings, describe_conversion, read_header
from splitwiser.model.hub import check_hub, not_available, only_files_of
from splitwiser.model.kv_pool import find_memory_problem
from splitwiser.model.rotary import last_length, length_computed_anew, rotary_parameters
from splitwiser.model.tokenizer import has_tokenizer_files, load_tokenizer
from splitwiser.request import Adapter

T = TypeVar("T")

LoadFormat = Literal["auto", "dummy"]

# Generation settings of a checkpoint that change no token here: special tokens, lengths, how it is computed and reported,
# and what each request sets itself. No mode applies any other setting; a note tells the user.
_CHANGES_NO_TOKEN = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "max_time",
    "do_sample", "temperature", "top_k", "top_p", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "compile_config", "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_lookbehind", "target_lookbehind", "transformers_version",
}  # fmt: skip
# what configurations call the number of positions, and the length that a model without a limit was trained with
_LIMITS = ("max_position_embeddings", "max_seq_len", "seq_length")
_UNLIMITED = {"bloom": 2048}
_INITIAL_DEVIATION = 0.02  # of most models' weights
_NEUTRAL: dict[str, object] = GenerationConfig._get_default_generation_params() | {"guidance_scale": 1.0}


@dataclass
class LoadedModel:
    """A model on its device with what is needed to serve it. ``parameters`` is the number of its weights, tied ones counted
    once, and ``weights`` says which they are: the seed that they were drawn with, or the files that they were read from,
    and those of ``adapters``, which requests may name;
    ``tokenizer`` is None if it has none that can be loaded, and ``no_text`` then says why prompts cannot be text.
    ``computed_anew_at`` is the length at which a request's K and V are computed anew
    (:func:`splitwiser.model.rotary.length_computed_anew`)."""

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
    notes: list[str] = field(default_factory=list)
    no_text: str = ""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

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


DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in SPELLINGS if name != "auto"}


def resolve_dtype(dtype: str, config: PreTrainedConfig) -> torch.dtype:
    """Return the torch dtype named ``dtype``, in any spelling; ``auto`` is the checkpoint's own. Raises :class:`InputError`
    for an unknown name and :class:`UnsupportedModelError` if the checkpoint's own is not supported."""
    name = dtype_name(dtype)
    if name == "auto":
        own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        if own not in DTYPES.values():
            raise UnsupportedModelError(
                f"--dtype auto: the checkpoint's own type is {own}, which is not served; give one of {', '.join(DTYPES)}"
            )
        return own
    return DTYPES[name]


def plan_model(
    model: str | Path, *, models: str | Path = constants.MODELS, dtype: str, device: str, load_format: str
) -> tuple[CatalogEntry, torch.device, PreTrainedConfig, torch.dtype]:
    """Return what :func:`load_model` would load with the same arguments: the catalogue's entry, device, configuration and
    dtype. Raises :class:`InputError`."""
    entry = check_model(model, models)
    place = resolve_device(device)
    config = _dummy_config(entry) if load_format == "dummy" else _checkpoint_config(entry)
    if getattr(config, "is_encoder_decoder", False):
        raise encoder_decoder(entry)
    if problem := find_eos_problem(config.get_text_config()):
        raise UnsupportedModelError(f"model {entry.name}: its configuration's {problem}")
    return entry, place, config, resolve_dtype(dtype, config)


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
        module = _read_checkpoint(entry, config, weights_dtype, place)
        if entry.gguf:
            notes += describe_conversion(read_header(entry.gguf), config, module.dtype, time.perf_counter() - reading)
        if module.dtype not in DTYPES.values():
            raise UnsupportedModelError(f"model {entry.name}: its weights are {module.dtype}, which is not served")
    notes += _unapplied_settings(module.generation_config)
    tokenizer, no_text = load_tokenizer(entry, local_only=load_format == "dummy")
    if has_tokenizer_files(entry) and no_text:
        notes.append(no_text)
    if tokenizer is None and load_format == "dummy":
        tokenizer, no_text = load_tokenizer(resolve_model(EMBEDDED_MODEL), local_only=True)
        notes.append(f"text is tokenised by {EMBEDDED_MODEL}'s tokenizer: {entry.name}'s own is not on this machine")
    eos = _eos_token_ids(module, tokenizer if load_format == "auto" else None)
    # a new one, so that mode generate applies no setting that the engine does not: no end-of-sequence token either, since
    # transformers would end a row at it even if the request ignores it
    module.generation_config = GenerationConfig(pad_token_id=0)
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
        notes=notes,
        no_text=no_text,
    )


def draw_weights(module: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Give ``module``, built without memory, the random weights of its own initialisation, drawn with ``seed``. Matrices
    that it leaves to the constructors of their layers (GPT's) are drawn too.

    They are made directly on ``device``, so there is never a second copy.
    """
    module.tie_weights()
    for name, parameter in list(module.named_parameters()):
        set_module_tensor_to_device(module, name, device, value=torch.zeros_like(parameter, device=device))
    module.tie_weights()
    torch.nn.Module.to(module, device)  # the buffers
    for part in module.modules():
        part.__dict__.pop("_is_hf_initialized", None)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        module.init_weights()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(0, _INITIAL_DEVIATION)


def without_memory(entry: CatalogEntry, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the architecture of ``config`` with its weights on the meta device. Raises :class:`UnsupportedModelError`."""
    try:
        with init_empty_weights(include_buffers=False):
            module: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=_own_attention(config)
            )
    except ValueError as error:  # transformers has no causal model of this kind
        raise UnsupportedModelError(f"model {entry.name}: {first_line(error)}") from error
    except Exception as error:  # inconsistent figures raise various errors
        raise _cannot_be_made(entry, error) from error
    module.tie_weights()
    return module


def _cannot_be_made(entry: CatalogEntry, error: Exception) -> UnsupportedModelError:
    """Return the error for whatever exception a library raises over a checkpoint's files."""
    return UnsupportedModelError(
        f"model {entry.name}: cannot be built from {entry.location}: {type(error).__name__}: {first_line(error)}"
    )


def weights_nbytes(module: PreTrainedModel) -> int:
    """Return the bytes of all weights, tied ones counted once."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _dummy_config(entry: CatalogEntry) -> PreTrainedConfig:
    if entry.config:
        figures = dict(entry.config)
        kind = figures.pop("model_type")
        if kind not in CONFIG_MAPPING:
            problem = unknown_name("model_type", kind, CONFIG_MAPPING)
            raise UnsupportedModelError(f"model {entry.name}: {problem.cli_message}")
        try:
            built: PreTrainedConfig = AutoConfig.for_model(kind, **figures)
        except Exception as error:  # inconsistent figures raise various errors
            raise _cannot_be_made(entry, error) from error
        return built
    return _checkpoint_config(entry)


def _own_attention(config: PreTrainedConfig) -> str | None:
    """Return the attention implementation that is used without the engine: None for transformers' choice, except for
    soft-capped scores, which its fused function ignores in version 5.17."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _from_cache_or_hub(entry: CatalogEntry, load: Callable[[bool], T]) -> T:
    """Return ``load(local_files_only)`` from this machine or, if it is not there, from the hub. Raises
    :class:`InputError`."""
    try:
        with without_bars():
            return load(True)
    except OSError as error:
        if not entry.hub:
            raise InputError(
                f"model {entry.name}: cannot be read from {entry.location}: {first_line(error)}"
            ) from error
    check_hub(entry)
    try:
        return load(False)
    except (OSError, RuntimeError) as error:
        raise InputError(not_available(entry, first_line(error))) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from showing progress bars: files of this machine take no time that needs one."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _checkpoint_config(entry: CatalogEntry) -> PreTrainedConfig:
    def load(local_files_only: bool) -> PreTrainedConfig:
        with only_files_of(entry) as place:
            config: PreTrainedConfig = AutoConfig.from_pretrained(**place, local_files_only=local_files_only)
        if entry.gguf:
            add_missing_settings(config, read_header(entry.gguf))
        return config

    try:
        return _from_cache_or_hub(entry, load)
    except ValueError as error:  # transformers does not know the architecture
        raise UnsupportedModelError(f"model {entry.name}: {first_line(error)}") from error
    except InputError:
        raise
    except Exception as error:
        raise _cannot_be_made(entry, error) from error


def _read_checkpoint(
    entry: CatalogEntry, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    def load(local_files_only: bool) -> PreTrainedModel:
        with only_files_of(entry) as place:
            made: Any = AutoModelForCausalLM.from_pretrained(
                **place,
                output_loading_info=True,
                config=config,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=_own_attention(config),
                local_files_only=local_files_only,
                quantization_config=GgufConfig(dequantize=True) if entry.gguf else None,
            )
        module: PreTrainedModel = made[0]
        if missing := sorted(made[1]["missing_keys"]):  # transformers would initialise them at random
            raise InputError(
                f"model {entry.name}: {entry.location} lacks {len(missing)} of the model's weights, such as {missing[0]}"
            )
        return module

    if problem := find_checkpoint_problem(entry, config, device):
        raise UnsupportedModelError(problem)
    try:
        return _from_cache_or_hub(entry, load)
    except InputError:
        raise
    except ValueError as error:
        raise UnsupportedModelError(f"model {entry.name}: {first_line(error)}") from error
    except Exception as error:
        raise _cannot_be_made(entry, error) from error


def _eos_token_ids(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    for source in (module.generation_config, module.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def _widened(config: PreTrainedConfig, dtype: torch.dtype) -> list[str]:
    stored = config.dtype
    if not isinstance(stored, torch.dtype) or stored.itemsize >= dtype.itemsize:
        return []
    names = [str(each).removeprefix("torch.") for each in (stored, dtype)]
    return [
        f"the weights are stored as {names[0]} and run as {names[1]}, which takes {dtype.itemsize // stored.itemsize} times "
        "the memory; dtype auto keeps their own"
    ]


def _unapplied_settings(generation: GenerationConfig | None) -> list[str]:
    given = generation.to_diff_dict() if generation else {}
    settings = [
        f"{name}={value}"
        for name, value in sorted(given.items())
        if name not in _CHANGES_NO_TOKEN
        and not name.startswith("_")
        and value not in (None, [], {}, _NEUTRAL.get(name))
    ]
    if not settings:
        return []
    return [f"the checkpoint's generation settings are not applied, in any mode: {', '.join(settings)}"]


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions that the model supports, or None if it has no limit. A model with dynamic NTK states
    the length that it was trained for, which the scaling multiplies."""
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in _LIMITS)
    limit: int | None = next(filter(None, named), _UNLIMITED.get(text.model_type))
    factors = [each["factor"] for each in rotary_parameters(config) if each.get("rope_type") == "dynamic"]
    limit = int(limit * max(factors)) if limit and factors else limit
    return min(filter(None, (limit, last_length(config))), default=None)
