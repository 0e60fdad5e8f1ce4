"""Reads adapters with peft: what each adds to linear layers or puts before prompts, and what peft's own model computes."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from splitwiser.errors import InputError, first_line
from splitwiser.model.adapters.files import TASKS, AdapterFiles
from splitwiser.model.adapters.loaded import KeysValues, LoadedAdapter, LoraPart
from splitwiser.model.forward import cache_argument
from splitwiser.model.loading import LoadedModel

with warnings.catch_warnings():  # what peft says about packages that adapters do not need
    warnings.simplefilter("ignore")
    from peft import PeftModel
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

NAME = "served"  # of an adapter within peft, which does not take every name that a user may give
_TOKENS = 6  # of a request by which adapters are tried


@torch.inference_mode()
def load_adapter(model: LoadedModel, files: AdapterFiles, merge: bool) -> LoadedAdapter:
    """Read an adapter for ``model``, whose attention must still be its own, and leave the model as it was or, if ``merge``,
    with the adapter in its weights. Raises :class:`InputError` for one that does not fit the model and, unless ``merge``,
    for a LoRA adapter that does more than add to the outputs of linear layers."""
    *prompt, next_token = [(7 * number + 3) % model.vocabulary for number in range(_TOKENS)]
    with fitting(model, files):
        opened = open_peft(model, files)
        tried = LoadedAdapter(files, prompt, next_token, _logits(model, opened, prompt, next_token))
        if files.virtual_tokens:
            return replace(tried, keys_values=_keys_values(model, opened, files.virtual_tokens))
        if merge:
            model.module = opened.merge_and_unload().requires_grad_(False)
            _forget(model)
            return tried
        if problem := _find_separation_problem(model, opened):
            raise InputError(
                f"--adapter {files.name}: {problem}, which cannot be done for single requests; --merge_adapter does it for "
                "all"
            )
        parts = _parts(opened)
        opened.unload()
        _forget(model)
        return replace(tried, parts=parts)


@contextmanager
def fitting(model: LoadedModel, files: AdapterFiles) -> Iterator[None]:
    """Within, whatever peft raises over ``files`` becomes an :class:`InputError` that names them. Raises it, too, for an
    adapter of another kind of model, and for virtual tokens of an encoder-decoder."""
    task = files.config.get("task_type")
    if task not in (None, TASKS[model.kind]):
        raise InputError(
            f"--adapter {files.name}: {files.directory} is made for the task {task}, and model {model.name} is of kind "
            f"{model.kind}; one for {TASKS[model.kind]} is needed"
        )
    if model.encodes and files.virtual_tokens:
        raise InputError(
            f"--adapter {files.name}: {files.kind_name} is not served with encoder-decoders, which compute with virtual "
            f"tokens anew for each source, so that requests cannot share them; model {model.name} takes LoRA"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arguments that transformers has renamed, among others
            # of weights that are not in the file, peft only warns, and draws them at random
            warnings.filterwarnings("error", message="Found missing adapter keys")
            yield
    except InputError:
        raise
    except Exception as error:  # a foreign file raises whatever it leads to
        raise InputError(
            f"--adapter {files.name}: {files.directory} does not fit model {model.name}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def open_peft(model: LoadedModel, files: AdapterFiles) -> PeftModel:
    """Return peft's model of ``model`` with the adapter of ``files``, which is :data:`NAME` there. Raises what peft
    raises."""
    opened = PeftModel.from_pretrained(
        model.module, files.directory, adapter_name=NAME, torch_device=str(model.device), autocast_adapter_dtype=False
    )
    return opened.eval().requires_grad_(False).to(model.device)


def _forget(model: LoadedModel) -> None:
    """Remove what peft notes on a module that it changes."""
    vars(model.module).pop("peft_config", None)


def _logits(model: LoadedModel, opened: PeftModel, prompt: Sequence[int], next_token: int) -> Tensor:
    """Return :attr:`LoadedAdapter.logits`: those after the prompt and after the next token or, of an encoder-decoder, whose
    prompt is the source, after the token that answers begin with and after the next."""
    read, answer = (prompt, [model.start_token_id, next_token]) if model.encodes else ([*prompt, next_token], None)
    ids = torch.tensor([read], device=opened.device)
    decoded = {"decoder_input_ids": torch.tensor([answer], device=opened.device)} if answer else {}
    logits: Tensor = opened(input_ids=ids, attention_mask=torch.ones_like(ids), **decoded).logits
    return logits[0, -2:].float()


def _find_separation_problem(model: LoadedModel, opened: PeftModel) -> str | None:
    """Return what the adapter does beside adding to the outputs of linear layers, in a few words; None if nothing."""
    if (bias := getattr(opened.peft_config[NAME], "bias", "none")) != "none":
        return f"it changes the biases of layers (bias: {bias})"
    for name, part in opened.get_base_model().named_modules():
        if isinstance(part, AuxiliaryTrainingWrapper):
            return f"it replaces weights of {name}"
        if not isinstance(part, BaseTunerLayer):
            continue
        layer = part.get_base_layer()
        if type(part) is not Linear or not isinstance(layer, (nn.Linear, Conv1D)):
            return f"it changes {name}, which is no linear layer"
        if part.lora_variant or part.lora_bias[NAME]:
            return f"it changes {name} by more than the product of two matrices"
        if layer is model.module.get_output_embeddings():
            return f"it changes {name}, which computes logits"
    return None


def _parts(opened: PeftModel) -> dict[str, LoraPart]:
    return {
        name: LoraPart(_weight(part.lora_A[NAME]), _weight(part.lora_B[NAME]), part.scaling[NAME])
        for name, part in opened.get_base_model().named_modules()
        if isinstance(part, Linear)
    }


def _weight(matrix: nn.Module) -> Tensor:
    assert isinstance(matrix.weight, Tensor)
    return matrix.weight.detach()


def _keys_values(model: LoadedModel, opened: PeftModel, tokens: int) -> KeysValues:
    """Return K and V of the virtual tokens. Those of prefix tuning are its parameters. Those of prompt tuning and p-tuning
    are computed by the model from embeddings; no later token changes them."""
    given: Tensor | Cache = opened.get_prompt(batch_size=1)
    if isinstance(given, Tensor):
        cache = DynamicCache()
        embeddings = given.to(model.dtype)
        model.module(inputs_embeds=embeddings, use_cache=True, **{cache_argument(model.module): cache})
        given = cache
    # a layer with a sliding window keeps the last tokens alone, since none of a prompt sees the others
    return [
        (_with_front(layer.keys, tokens), _with_front(layer.values, tokens))
        for layer in cast("list[DynamicLayer]", given.layers)
    ]


def _with_front(kept: Tensor | None, tokens: int) -> Tensor:
    """Return ``kept``, (1, heads, at most ``tokens``, size), as (heads, ``tokens``, size) with zeros for missing tokens in
    front."""
    assert kept is not None
    return pad(kept[0], (0, 0, tokens - kept.shape[2], 0))
