"""Attaches the engine to a model, or refuses the model with the reason if the engine cannot serve it exactly: the steps that
models of every kind share.

What differs by kind is an :class:`Attachment`; :mod:`splitwiser.model.compatibility` has that of decoders and
:mod:`splitwiser.model.seq2seq.attach` that of encoder-decoders.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitwiser.errors import UnsupportedModelError, first_line
from splitwiser.model.fusing import Run, fuse_parts
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.loading import LoadedModel
from splitwiser.model.trials import BOUNDS, Trial, agree

# A model may make more of rounding than trials allow: then twice what it makes of its embeddings being rounded differently,
# up to a quarter of the largest logit, beyond which nothing would be shown.
_MOST_ROUNDING = 0.25
_ROUNDINGS = 3

Logits = Tensor | Sequence[Tensor]
"""Logits of a trial, float32: rows, or tensors of rows, of the size of the vocabulary."""


@dataclass(frozen=True)
class Comparison:
    """Logits that must be the same: ``own``, by the model's own attention, and what ``served`` returns, given the shapes of
    the layers, after the engine has been attached: those by the engine, computed in one way or in several. ``of`` says what
    they are of; they may differ by ``bounds``, by dtype, relative to the largest."""

    of: str
    own: Logits
    served: Callable[[Sequence[LayerShape]], Sequence[Logits]]
    bounds: Mapping[torch.dtype, float]


@dataclass(frozen=True)
class Attachment:
    """How models of one kind are attached to the engine, and what shows that they are then served exactly.

    ``find_problem`` returns why a model cannot be attached, as far as that is known without a forward. ``compare`` runs the
    model's own attention and returns what must stay the same, the first of which is looked at again with fused modules.
    ``replace_attention`` makes it attend through the engine, ``probe_layers`` returns the shape of what each layer stores,
    ``run`` runs the whole model once and ``embeddings`` finds the modules that embed tokens. ``explain`` returns why a model
    cannot be served whose forward raised an error, to follow its name. ``kernels`` are those that attend for such models, by
    their field of :class:`~splitwiser.model.kernels.interface.PoolKernels`; they are tried by ``packed_logits``, which
    computes logits after prompts of one length, packed, over a pool with the given kernels and blocks of so many tokens.
    """

    find_problem: Callable[[PreTrainedModel], str | None]
    compare: Callable[[LoadedModel], Sequence[Comparison]]
    replace_attention: Callable[[LoadedModel], None]
    probe_layers: Callable[[LoadedModel], list[LayerShape]]
    run: Run
    embeddings: Callable[[PreTrainedModel], Iterable[nn.Module]]
    explain: Callable[[Exception], str]
    kernels: Sequence[str]
    packed_logits: Callable[
        [LoadedModel, Sequence[LayerShape], Sequence[list[int]], PoolKernels, int | None], Sequence[Tensor]
    ]


def attach(how: Attachment, model: LoadedModel, *, pack: bool = False, remember: bool = False) -> list[LayerShape]:
    """Make ``model`` attend through the KV pool, and return the shape of what each of its layers stores there. With
    ``pack``, its modules are fused and, on a CPU, its linear layers packed, and the check of the logits covers that. With
    ``remember``, what an earlier load of the same model found is not tried again (:mod:`splitwiser.model.trials`).

    Raises :class:`UnsupportedModelError` with the reason unless the engine is shown to serve the model exactly.
    """
    module = model.module
    name = type(module).__name__
    if problem := how.find_problem(module):
        raise UnsupportedModelError(problem)
    trial = Trial(model, f"attach, packed: {pack}", compiled=pack) if remember else None
    known = trial.outcome if trial else None
    try:
        with torch.inference_mode():
            comparisons = [] if known else how.compare(model)
            how.replace_attention(model)
            layers = [LayerShape(*each) for each in known["layers"]] if known else how.probe_layers(model)
            served = [each.served(layers) for each in comparisons]
            choices = fuse_parts(module, known and known["fused"], how.run) if pack else []
            problem = None if known else _find_difference(how, model, layers, comparisons, served, pack)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}; use --mode generate") from error
    except Exception as error:  # any error of the model's forward means that it cannot be served
        raise UnsupportedModelError(f"{name} {how.explain(error)}; use --mode generate") from error
    if problem:
        raise UnsupportedModelError(f"{name}: {problem}")
    if trial and not known:
        trial.remember({"layers": [astuple(layer) for layer in layers], "fused": choices})
    return layers


def cannot_be_served(error: Exception) -> str:
    """Return that a model cannot be served whose forward raised ``error``, to follow its name."""
    return f"cannot be served by the engine ({type(error).__name__}: {first_line(error)})"


def _find_difference(
    how: Attachment,
    model: LoadedModel,
    layers: Sequence[LayerShape],
    comparisons: Sequence[Comparison],
    served: Sequence[Sequence[Logits]],
    packed: bool,
) -> str | None:
    """Return which logits differ by more than rounding does, before or after packing, and what to do instead; None if none
    do."""
    first = comparisons[0]
    fused = first.served(layers) if packed else served[0]
    pairs = [(ours, each) for each, ways in zip(comparisons, served, strict=True) for ours in ways]
    pairs += [(ours, first) for ours in fused]
    rounding = 0.0
    if model.dtype != torch.float32 and not all(agree(ours, of.own, of.bounds[model.dtype]) for ours, of in pairs):
        rounding = min(2 * _find_rounding(how, model, layers, first, fused), _MOST_ROUNDING)
    for each, ways in zip(comparisons, served, strict=True):
        bound = max(each.bounds[model.dtype], rounding)
        if not all(agree(ours, each.own, bound) for ours in ways):
            return (
                f"{each.of} do not give the same logits as each alone, so the engine would give wrong tokens; use --mode "
                "generate"
            )
    # fused modules round less often than the model's own, which adds up over the layers
    bound = 3 * max(first.bounds[model.dtype], rounding)
    if not all(agree(ours, first.own, bound) for ours in fused):
        return "its logits change when its modules are fused; use --kernels plain"
    return None


def _find_rounding(
    how: Attachment, model: LoadedModel, layers: Sequence[LayerShape], of: Comparison, served: Sequence[Logits]
) -> float:
    """Return by how much ``served``, the logits of ``of``, change at most, relative to the largest, when each number of the
    embeddings is one rounding larger or smaller: what the model makes of rounding alone."""
    random = torch.Generator().manual_seed(0)

    def round_differently(_: nn.Module, __: object, embedded: Tensor) -> Tensor:
        signs = torch.randint(0, 2, embedded.shape, generator=random).to(embedded) * 2 - 1
        return embedded * (1 + torch.finfo(embedded.dtype).eps * signs)

    hooks = [part.register_forward_hook(round_differently) for part in how.embeddings(model.module)]
    try:
        again = [of.served(layers) for _ in range(_ROUNDINGS)]
    finally:
        for hook in hooks:
            hook.remove()
    return max(
        float(((new - old).abs().amax(-1) / old.abs().amax(-1)).max())
        for ways in again
        for news, olds in zip(ways, served, strict=True)
        for new, old in zip(news, olds, strict=True)
    )


def try_kernels(
    how: Attachment, model: LoadedModel, layers: Sequence[LayerShape], kernels: PoolKernels, block_tokens: int
) -> dict[str, str]:
    """Return why kernels cannot serve ``model``, which the engine is attached to: one line each, by the name of the field of
    :class:`~splitwiser.model.kernels.interface.PoolKernels`. Each is tried on two prompts of over two blocks."""
    length = min(2 * block_tokens + 5, model.max_positions or sys.maxsize)
    prompts = [[(7 * number + 3) % model.vocabulary for number in range(start, start + length)] for start in (0, 11)]
    refused: dict[str, str] = {}
    with torch.inference_mode():
        tried = {name: kernel for name in how.kernels if (kernel := getattr(kernels, name)) is not None}
        expected = how.packed_logits(model, layers, prompts, PoolKernels(), block_tokens) if tried else []
        for name, kernel in tried.items():
            try:
                logits = how.packed_logits(model, layers, prompts, PoolKernels(**{name: kernel}), block_tokens)
            except Exception as error:  # Triton's errors derive from Exception alone
                refused[name] = f"{type(error).__name__}: {first_line(error)}"
            else:
                if not agree(torch.cat(tuple(logits)), torch.cat(tuple(expected)), BOUNDS[model.dtype]):
                    refused[name] = "its logits differ from PyTorch's"
    return refused
