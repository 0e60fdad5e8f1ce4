"""One forward of a model over packed tokens: what both phases' steps, and their CUDA graphs, are made of."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from splitwiser.model import attention
from splitwiser.model.attention import StepCache


def forward(
    module: PreTrainedModel,
    cache: StepCache,
    step: attention.Attends,
    token_ids: Sequence[int] | Tensor,
    positions: Sequence[int] | Tensor,
    rows: Sequence[int] | Tensor,
) -> Tensor:
    """One forward of packed tokens; the logits of ``rows``, shape (rows, vocabulary), in the model's dtype.

    ``token_ids``, ``positions`` and ``rows`` are numbers, or int64 tensors on the model's device of one dimension.
    """
    kept = torch.as_tensor(rows, device=module.device)
    keeps = "logits_to_keep" in _parameters(type(module).forward)
    # Triton and cuBLAS launch on the current device, which need not be the model's
    on_device = torch.cuda.device(module.device) if module.device.type == "cuda" else nullcontext()
    with on_device, attention.serving(step):
        output = module(
            input_ids=torch.as_tensor(token_ids, device=module.device)[None],
            position_ids=torch.as_tensor(positions, device=module.device)[None],
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": kept} if keeps else {}),
        )
    logits: Tensor = output.logits[0]
    return logits if keeps else logits[kept]


@cache
def _parameters(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
