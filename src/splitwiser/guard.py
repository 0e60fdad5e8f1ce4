"""Attaches the engine to a model, or refuses it with the reason: what cannot be served exactly is never served wrongly."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from splitwiser import attention
from splitwiser.attention import AttentionOptions, Mask, Segment, StepAttention, StepCache
from splitwiser.errors import UnsupportedModelError, first_line
from splitwiser.forward import forward
from splitwiser.fused import fuse_parts
from splitwiser.kv_pool import KVPool, LayerShape
from splitwiser.model import LoadedModel
from splitwiser.packed import pack_linears
from splitwiser.pool_kernels import PoolKernels

# half precisions differ by rounding; a dropped term or a leak between requests differs by far more
_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def attach_engine(model: LoadedModel, *, pack: bool = False) -> list[LayerShape]:
    """Make ``model`` attend through the KV pool, and return what each of its layers keeps there. With ``pack``, parts of it
    are fused and its linear layers packed, which the check of the logits then covers.

    Raises :class:`UnsupportedModelError` with the reason unless it is shown that the engine serves the model exactly:
    the class must dispatch its attention through transformers' interface; in a forward each layer must store K and V
    and then attend exactly once, with a causal mask; and two prompts packed in one row must give the logits that the
    model's own attention gives for each alone.
    """
    module = model.module
    name = type(module).__name__
    if problem := find_dispatch_problem(module):
        raise UnsupportedModelError(problem)
    prompts = _probe_prompts(model)
    try:
        with torch.inference_mode():
            expected = [_own_logits(model, prompt) for prompt in prompts]
            module.set_attn_implementation(attention.NAME)
            layers = _probe_layers(model, prompts[0])
            served = _served_logits(model, layers, prompts)
            if pack:
                fuse_parts(module)
                pack_linears(module)
            fused = _served_logits(model, layers, prompts) if pack else served
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a foreign forward raises means the same: it cannot be served
        raise UnsupportedModelError(
            f"{name} cannot be served by the engine; use --mode generate ({type(error).__name__}: {first_line(error)})"
        ) from error
    bound = _BOUNDS[model.dtype]
    if not all(_agree(each, expected, bound) for each in served):
        raise UnsupportedModelError(
            f"{name}: two packed prompts do not give the logits that each gives alone, so the engine would give wrong "
            "tokens; use --mode generate"
        )
    if not all(
        _agree(each, expected, 3 * bound) for each in fused
    ):  # every part rounds less often than the model's own, which adds up
        raise UnsupportedModelError(f"{name}: with fused parts it gives other logits than its own; use --kernels plain")
    return layers


def try_kernels(
    model: LoadedModel, layers: Sequence[LayerShape], kernels: PoolKernels, block_tokens: int
) -> dict[str, str]:
    """Why the decode kernel or that for packed prompts cannot serve ``model``, which the engine is attached to: by the name
    of the field of :class:`~splitwiser.pool_kernels.PoolKernels`, a line each. Tried on two prompts of over two blocks."""
    length = min(2 * block_tokens + 5, model.max_positions or sys.maxsize)
    prompts = [[(7 * number + 3) % model.vocabulary for number in range(start, start + length)] for start in (0, 11)]
    refused = {}
    with torch.inference_mode():
        expected = _served_logits(model, layers, prompts)
        for name in ("decode", "packed"):
            if (kernel := getattr(kernels, name)) is None:
                continue
            try:
                given = _served_logits(model, layers, prompts, PoolKernels(**{name: kernel}), block_tokens)
            except Exception as error:  # Triton's errors have no base of their own among Python's
                refused[name] = f"{type(error).__name__}: {first_line(error)}"
            else:
                if not all(map(_agree, given, expected, [_BOUNDS[model.dtype]] * len(given))):
                    refused[name] = "it gives other logits than PyTorch"
    return refused


def _agree(ours: Tensor, theirs: Tensor | Sequence[Tensor], bound: float) -> bool:
    return all(
        bool((one - other).abs().max() <= bound * max(1.0, float(other.abs().max())))
        for one, other in zip(ours, theirs, strict=True)
    )


def find_dispatch_problem(module: PreTrainedModel) -> str | None:
    """Why the engine cannot reach the attention of ``module``, which needs no weights for that; None if it can."""
    if module._can_set_attn_implementation():
        return None
    return (
        f"{type(module).__name__} does not dispatch its attention through transformers' attention interface, so the engine "
        "cannot serve it; use --mode generate"
    )


class _Probe(StepCache):
    """Stands in for the pool in one forward and notes what each layer does."""

    def __init__(self) -> None:
        self.stored: dict[int, LayerShape] = {}
        self.events: list[tuple[str, int]] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.events.append(("stores", layer_idx))
        self.stored[layer_idx] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        self.events.append(("attends", self.events[-1][1] if self.events else -1))
        if not isinstance(mask, Mask):
            raise UnsupportedModelError("a layer attends without the model's mask")
        first = torch.zeros((), dtype=torch.long, device=query.device)
        if bool(mask(first, first + 1)):
            raise UnsupportedModelError("a layer's attention looks at later tokens")
        return attention.attend(query, key, value, None, options).transpose(1, 2)


def _probe_layers(model: LoadedModel, prompt: list[int]) -> list[LayerShape]:
    probe = _Probe()
    try:
        forward(model.module, probe, probe, prompt, range(len(prompt)), [len(prompt) - 1])
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model.module).__name__}: {error}; use --mode generate") from error
    layers = model.module.config.get_text_config().num_hidden_layers
    expected = [(event, layer) for layer in range(layers) for event in ("stores", "attends")]
    if probe.events != expected:
        seen = sum(event == "attends" for event, _ in probe.events)
        raise UnsupportedModelError(
            f"{type(model.module).__name__}: {seen} attentions over stored K and V in a forward of {layers} layers, where "
            "each layer must store and attend exactly once; use --mode generate"
        )
    return [probe.stored[layer] for layer in range(layers)]


def _probe_prompts(model: LoadedModel) -> list[list[int]]:
    return [[(7 * number + 3) % model.vocabulary for number in range(start, start + 5)] for start in (0, 11)]


def _own_logits(model: LoadedModel, prompt: list[int]) -> Tensor:
    ids = torch.tensor([prompt], device=model.device)
    logits: Tensor = model.module(input_ids=ids).logits
    return logits[0, -1].float()


def _served_logits(
    model: LoadedModel,
    layers: Sequence[LayerShape],
    prompts: Sequence[list[int]],
    kernels: PoolKernels = PoolKernels(),  # noqa: B008  # of no state
    block_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits after prompts of one length, packed in one row: as a prefill step gives them, as a step of their second
    halves does, and as a decode step of their last tokens. Each prompt lies in one block, if not in those of
    ``block_tokens``."""
    length = len(prompts[0])
    size = block_tokens or length
    each = -(-length // size)
    pool = KVPool(layers, len(prompts) * each, size, model.dtype, model.device, kernels=kernels)

    def step(start: int) -> Tensor:
        blocks = [range(number * each, (number + 1) * each) for number in range(len(prompts))]
        segments = [Segment(own, length, length - start) for own in blocks]
        tokens = [token for prompt in prompts for token in prompt[start:]]
        positions = [position for segment in segments for position in segment.positions]
        ends = [(number + 1) * (length - start) - 1 for number in range(len(prompts))]
        attends = StepAttention(pool, segments, model.device)
        return forward(model.module, attends, attends, tokens, positions, ends).float()

    return step(0), step(length // 2), step(length - 1)
