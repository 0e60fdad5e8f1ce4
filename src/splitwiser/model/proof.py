"""What the proofs that a model is served exactly have in common: what is tried, and when logits count as the same."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from splitwiser.model.loading import LoadedModel
from splitwiser.model.padding import pad

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
    ids, mask = pad(prompts, model.device, model.padding_side)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=2, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    generate = cast("Callable[..., Any]", model.module.generate)
    first, second = generate(input_ids=ids, attention_mask=mask, generation_config=config).logits
    return first.float(), second.float()
