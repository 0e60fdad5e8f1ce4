"""What ``splitwiser models`` says of each model: counted from its configuration, without weights and without the hub."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from splitwiser.errors import SplitwiserError, UnsupportedModelError
from splitwiser.model.checkpoints.catalog import CatalogEntry, check_model
from splitwiser.model.checkpoints.configuration import plan_model
from splitwiser.model.checkpoints.hub import find_file
from splitwiser.model.checkpoints.weights import weights_nbytes, without_memory
from splitwiser.model.dispatch.table import describe_route, dispatch_attention, find_dispatch_problem
from splitwiser.model.rotary import depends_on_length


@dataclass(frozen=True)
class Overview:
    """A model's number of parameters (tied ones counted once) and bytes in bfloat16, None if its configuration is not on
    this machine, and the ``route`` by which the engine serves it with which ``adapters``; if it does not, ``problem`` is
    why, in one line."""

    parameters: int | None = None
    nbytes: int | None = None
    route: str = ""
    adapters: str = ""
    problem: str = ""


def describe_model(entry: CatalogEntry, models: str | Path) -> Overview:
    """Return the overview of ``entry``, which is of the file ``models``."""
    load_format = "dummy" if entry.config else "auto"
    try:
        check_model(entry.name, models)
        if not entry.config and find_file(entry, "config.json") is None:
            return Overview(problem="its configuration is not on this machine")
        _, _, config, dtype = plan_model(
            entry.name, models=models, dtype="bfloat16", device="cpu", load_format=load_format
        )
        module = without_memory(entry, config, dtype)
    except SplitwiserError as error:
        return Overview(problem=error.cli_message)
    parameters, nbytes = sum(each.numel() for each in module.parameters()), weights_nbytes(module)
    try:
        return Overview(parameters, nbytes, find_route(module), find_adapters(module))
    except UnsupportedModelError as error:
        return Overview(parameters, nbytes, problem=error.cli_message)


def find_adapters(module: PreTrainedModel) -> str:
    """Return with which adapters ``module`` is served: yes for all kinds, or LoRA alone."""
    return "LoRA" if module.config.is_encoder_decoder or depends_on_length(module) else "yes"


def find_route(module: PreTrainedModel) -> str:
    """Return how the engine would serve ``module``, which may be without memory, and whose attention is replaced. Raises
    :class:`UnsupportedModelError` for what can be known without weights; a model can still be refused at load."""
    if problem := find_dispatch_problem(module):
        raise UnsupportedModelError(problem)
    with torch.device(module.device):
        dispatch_attention(module)
    return describe_route(module)
