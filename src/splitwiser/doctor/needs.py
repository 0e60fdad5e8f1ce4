"""What a run of a model needs on this machine, determined without creating weights and without contacting the hub."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from splitwiser import constants
from splitwiser.doctor.config import DoctorConfig
from splitwiser.doctor.survey import Found
from splitwiser.errors import InputError, UnsupportedModelError, first_line
from splitwiser.model.checkpoints.catalog import CatalogEntry, resolve_model
from splitwiser.model.checkpoints.checkpoint import WEIGHT_FILES, find_checkpoint_problem
from splitwiser.model.checkpoints.configuration import plan_model
from splitwiser.model.checkpoints.hub import find_file, not_available
from splitwiser.model.checkpoints.tokenizer import has_tokenizer_files, load_tokenizer
from splitwiser.model.checkpoints.weights import weights_nbytes, without_memory
from splitwiser.model.dispatch.table import find_dispatch_problem
from splitwiser.model.kernels.interface import LayerShape
from splitwiser.model.kv_pool import block_nbytes, find_memory_problem, plan_blocks, stored_dtype
from splitwiser.model.loading import longest_request, max_positions
from splitwiser.text import format_size, parse_bytes

DOWNLOAD = "not in the local cache, so a run downloads it first"


@dataclass(frozen=True)
class Needs:
    """Memory that a run of the model needs, as far as it is known, and what prevents the run.

    ``weights``, ``pool`` (an estimate if ``about``) and ``free`` are bytes. ``problem`` prevents every mode, ``dispatch``
    every mode of the project's own engine, ``memory_alone`` and ``memory_with_pool`` the modes without and with a KV pool,
    ``text`` text prompts. ``where`` says where the model comes from.
    """

    weights: int | None = None
    pool: int | None = None
    about: bool = False
    free: int = 0
    problem: str | None = None
    dispatch: str | None = None
    text: str | None = None
    memory_alone: str | None = None
    memory_with_pool: str | None = None
    where: str = ""

    @property
    def note(self) -> str:
        """Note for a run that works."""
        return DOWNLOAD if self.where.endswith(DOWNLOAD) else ""

    def find_model(self) -> Found:
        """Return the finding about the model itself."""
        problem = self.problem or self.dispatch or self.text
        return (None if self.note and not problem else problem is None), problem or self.where, {}

    def find_memory(self) -> Found:
        """Return the finding about the memory of weights and KV pool."""
        figures = {"weights_bytes": self.weights, "pool_bytes": self.pool, "free_bytes": self.free}
        if self.weights is None:
            return None, "cannot be determined without the model's configuration", figures
        text = f"weights {format_size(self.weights)}"
        if self.pool is not None:
            text += f", KV pool {'about ' if self.about else ''}{format_size(self.pool)}"
        return (
            not (self.memory_alone or self.memory_with_pool),
            f"{text}, of {format_size(self.free)} available",
            figures,
        )


def find_needs(config: DoctorConfig, device: torch.device, free: int, unreachable: str | None) -> Needs:
    """Return what a run of ``config``'s model needs on ``device`` with ``free`` bytes.

    ``unreachable`` is the reason if the hub cannot be reached. Raises :class:`InputError` for an unknown model, type or
    load format.
    """
    entry = resolve_model(config.model, config.models)
    shape_is_known, problem, where = _find_files(entry, config, unreachable)
    where = f"{entry.name} at {entry.location}" + (f": {where}" if where else "")
    if not shape_is_known:
        return Needs(free=free, problem=problem, where=where)
    load_format = "dummy" if entry.config and not _is_here(entry, ["config.json"]) else config.load_format
    text = None
    try:
        # a model's shape does not depend on the device, which would initialise CUDA in this process
        _, _, figures, dtype = plan_model(
            config.model, models=config.models, dtype=config.dtype, device="cpu", load_format=load_format
        )
        if load_format == config.load_format == "auto":
            problem = problem or find_checkpoint_problem(entry, figures, device)
            text = _find_text_problem(entry, config, unreachable)
        module = without_memory(entry, figures, dtype)
        dispatch = find_dispatch_problem(module)
        needs = _measure(entry.name, module, config, device, free)
    except UnsupportedModelError as error:
        return Needs(free=free, problem=error.cli_message, where=where)
    except InputError:
        raise
    except Exception as error:  # whatever building the model's architecture raises
        return Needs(free=free, problem=f"model {entry.name}: {type(error).__name__}: {first_line(error)}", where=where)
    return replace(needs, problem=problem, dispatch=dispatch, text=text, where=where)


def _find_files(entry: CatalogEntry, config: DoctorConfig, unreachable: str | None) -> tuple[bool, str | None, str]:
    """Return whether the model's shape is known here, why the model is not available, and where it comes from."""
    if config.load_format == "dummy" and (entry.config or _is_here(entry, ["config.json"])):
        return True, None, "random weights, nothing to download"
    if entry.path:
        return True, None, ""
    if _is_here(entry, WEIGHT_FILES):
        return True, None, "in the local cache"
    # the catalogue does not give the number type of the checkpoint
    shape_is_known = _is_here(entry, ["config.json"]) or (bool(entry.config) and config.dtype != "auto")
    return shape_is_known, not_available(entry, unreachable) if unreachable else None, DOWNLOAD


def _find_text_problem(entry: CatalogEntry, config: DoctorConfig, unreachable: str | None) -> str | None:
    """Return why text prompts cannot be tokenised; None if they can, or with ``--prompt_tokens``, which needs no text."""
    downloaded = entry.hub and not unreachable and not has_tokenizer_files(entry)
    if config.prompt_tokens is not None or downloaded:
        return None
    return load_tokenizer(entry, local_only=True)[1] or None


def _is_here(entry: CatalogEntry, names: Sequence[str]) -> bool:
    """Return whether one of the files ``names`` of the model is in its directory or in the hub's local cache."""
    return any(find_file(entry, name) for name in names)


def _measure(name: str, module: PreTrainedModel, config: DoctorConfig, device: torch.device, free: int) -> Needs:
    weights, dtype = weights_nbytes(module), module.dtype
    alone, with_pool = (
        find_memory_problem(name, weights, dtype, kv_memory, free, device) for kv_memory in ("auto", config.kv_memory)
    )
    pool = None
    if config.kv_memory != "auto":
        pool = parse_bytes(config.kv_memory)
    elif (layers := _likely_layers(module.config)) and weights <= free:
        tokens, own = constants.BLOCK_TOKENS, module.config
        longest = longest_request(max_positions(own), own.is_encoder_decoder)
        stored = stored_dtype(config.kv_dtype, dtype)
        blocks = plan_blocks(layers, "auto", tokens, stored, device, config.max_batch, longest, free - weights)
        pool = blocks * block_nbytes(layers, tokens, stored)
    about = config.kv_memory == "auto"
    return Needs(weights, pool, about, free, memory_alone=alone, memory_with_pool=with_pool)


def _likely_layers(config: PreTrainedConfig) -> list[LayerShape] | None:
    """Return the K and V shape of each layer as most configurations give it; only a forward, as in a run, is certain."""
    text = config.get_text_config()
    heads, layers = getattr(text, "num_attention_heads", None), getattr(text, "num_hidden_layers", None)
    if config.is_encoder_decoder:  # the decoder's, as BART's relatives and T5's call them
        heads = getattr(config, "decoder_attention_heads", heads)
        layers = getattr(config, "decoder_layers", getattr(config, "num_decoder_layers", layers))
    grouped = getattr(text, "new_decoder_architecture", False) and text.num_kv_heads  # Falcon's names
    single = 1 if getattr(text, "multi_query", False) else None
    kv_heads = getattr(text, "num_key_value_heads", None) or grouped or single or heads
    size = getattr(text, "head_dim", None) or (heads and getattr(text, "hidden_size", 0) // heads)
    return [LayerShape(kv_heads, size, size)] * layers if layers and kv_heads and size else None
