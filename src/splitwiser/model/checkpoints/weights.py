"""A model's weights: read from a checkpoint, drawn at random, or left out."""

from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from splitwiser.errors import InputError, UnsupportedModelError, first_line
from splitwiser.model.checkpoints.catalog import CatalogEntry
from splitwiser.model.checkpoints.checkpoint import find_checkpoint_problem
from splitwiser.model.checkpoints.configuration import cannot_be_made, from_cache_or_hub
from splitwiser.model.checkpoints.hub import only_files_of

_INITIAL_DEVIATION = 0.02  # of most models' weights


def auto_class(config: PreTrainedConfig) -> Any:  # noqa: ANN401  # transformers' classes are not annotated
    """Return the class of transformers that makes models of ``config``'s kind."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def without_memory(entry: CatalogEntry, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the architecture of ``config`` with its weights on the meta device. Raises :class:`UnsupportedModelError`."""
    try:
        # nothing would come of initialising weights without memory, which takes most of the time
        with init_empty_weights(include_buffers=False), no_init_weights():
            module: PreTrainedModel = auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=_own_attention(config)
            )
    except ValueError as error:  # transformers has no model of this kind that generates text
        raise UnsupportedModelError(f"model {entry.name}: {first_line(error)}") from error
    except Exception as error:  # inconsistent figures raise various errors
        raise cannot_be_made(entry, error) from error
    tie_weights(module)
    return module


def tie_weights(module: PreTrainedModel) -> None:
    """Tie the weights that a checkpoint of ``module``'s configuration ties.

    transformers ties the output layer of every T5 to its embeddings until it reads a checkpoint with an output layer. Those
    of models that do not scale the decoder's outputs, such as FLAN-T5, have one: here it gets weights of its own, zeros.
    """
    module.tie_weights()
    if getattr(module.config, "scale_decoder_outputs", True) is False:
        head = module.get_output_embeddings()
        head.weight = nn.Parameter(torch.zeros_like(head.weight))


def weights_nbytes(module: PreTrainedModel) -> int:
    """Return the bytes of all weights, tied ones counted once."""
    return sum(parameter.nbytes for parameter in module.parameters())


def draw_weights(module: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Give ``module``, built without memory, the random weights of its own initialisation, drawn with ``seed``. Matrices
    that it leaves to the constructors of their layers (GPT's) are drawn too.

    They are made directly on ``device``, so there is never a second copy.
    """
    tie_weights(module)
    for name, parameter in list(module.named_parameters()):
        set_module_tensor_to_device(module, name, device, value=torch.zeros_like(parameter, device=device))
    tie_weights(module)
    torch.nn.Module.to(module, device)  # the buffers
    for part in module.modules():
        part.__dict__.pop("_is_hf_initialized", None)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        module.init_weights()
        tie_weights(module)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(0, _INITIAL_DEVIATION)


def read_weights(
    entry: CatalogEntry, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Return the model of ``entry`` on ``device`` with the weights of its checkpoint. Raises :class:`InputError` if some are
    missing or it is nowhere, and :class:`UnsupportedModelError` if it cannot be read."""

    def load(local_files_only: bool) -> PreTrainedModel:
        with only_files_of(entry) as place:
            made: Any = auto_class(config).from_pretrained(
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
        return from_cache_or_hub(entry, load)
    except InputError:
        raise
    except ValueError as error:
        raise UnsupportedModelError(f"model {entry.name}: {first_line(error)}") from error
    except Exception as error:
        raise cannot_be_made(entry, error) from error


def _own_attention(config: PreTrainedConfig) -> str | None:
    """Return the attention implementation that is used without the engine: None for transformers' choice, except for
    soft-capped scores, which its fused function ignores in version 5.17."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
