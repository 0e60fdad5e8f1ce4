"""Attaches the engine to an encoder-decoder, or refuses it with the reason if the engine cannot serve it exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from splitwiser.errors import UnsupportedModelError
from splitwiser.model import attach as attach_module
from splitwiser.model import attention
from splitwiser.model.attach import Attachment, Comparison, attach, cannot_be_served
from splitwiser.model.attention import AttentionOptions, AttentionStep, StepCache, serving
from splitwiser.model.dispatch.table import find_dispatch_problem
from splitwiser.model.forward import cache_argument
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import Segment
from splitwiser.model.seq2seq.forward import decode, decode_logits, encode, prefill_logits, start_token_of
from splitwiser.model.seq2seq.parts import replace_parts
from splitwiser.model.seq2seq.steps import EncoderStep, PackedStep, is_view_of_source
from splitwiser.model.trials import BOUNDS, padding_keeps_logits, probe_prompts

_ANSWER = 4  # tokens of an answer that are tried


def attach_engine(model: LoadedModel, *, pack: bool = False, remember: bool = False) -> list[LayerShape]:
    """Make ``model``, an encoder-decoder, attend through the KV pool; see :func:`splitwiser.model.attach.attach`, whose
    arguments and result these are.

    Raises :class:`UnsupportedModelError` with the reason unless the engine is shown to serve the model exactly: the class
    must dispatch its attention through transformers' interface; each layer of the decoder must store K and V of the answer
    and of the source, of one shape, and attend to each once; its relative bias must be a table; and sources packed in one
    row, with answers of different lengths decoded together, must give the logits that the model's own attention gives for
    each alone.
    """
    return attach(_ENCODER_DECODER, model, pack=pack, remember=remember)


def try_kernels(
    model: LoadedModel, layers: Sequence[LayerShape], kernels: PoolKernels, block_tokens: int
) -> dict[str, str]:
    """See :func:`splitwiser.model.attach.try_kernels`."""
    return attach_module.try_kernels(_ENCODER_DECODER, model, layers, kernels, block_tokens)


@torch.inference_mode()
def padding_changes_tokens(model: LoadedModel) -> bool:
    """Return whether sources of different lengths in one batch, padded on the right as in mode ``generate``, may give other
    tokens than each alone."""
    sources = [source[:length] for source, length in zip(probe_prompts(model), (2, 5), strict=True)]
    try:
        return not padding_keeps_logits(model, sources)
    except Exception:  # any error of the model's forward: nothing is shown
        return True


def _find_problem(module: PreTrainedModel) -> str | None:
    if problem := find_dispatch_problem(module):
        return problem
    if getattr(module.config, "expert_capacity", None) is None:
        return None
    return (
        f"{type(module).__name__}: an expert takes no more than expert_capacity tokens of a step, so what one request gets "
        "depends on the others; use --mode generate"
    )


def _compare(model: LoadedModel) -> list[Comparison]:
    sources = probe_prompts(model)
    own = [_own_logits(model, source) for source in sources]
    return [Comparison("two packed sources", own, lambda layers: [_served_logits(model, layers, sources)], BOUNDS)]


def _replace_attention(model: LoadedModel) -> None:
    module = model.module
    for part in (module, *_halves(module)):  # T5's halves have configurations of their own
        part.set_attn_implementation(attention.NAME)
    replace_parts(module, model.max_positions)


def _halves(module: PreTrainedModel) -> list[PreTrainedModel]:
    return [module.get_encoder(), module.get_decoder()]


class _Positioned(PackedStep):
    """Lets another step attend, from given positions."""

    def __init__(self, step: AttentionStep, positions: Tensor) -> None:
        super().__init__()
        self.positions = positions
        self._step = step

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._step.store(layer, key, value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        return self._step.attend(query, key, value, mask, options)


def run_both_halves(module: PreTrainedModel, step: AttentionStep, token_ids: Sequence[int]) -> None:
    """Run both halves of an encoder-decoder once, over a source and an answer of the same tokens."""
    ids = torch.tensor([token_ids], device=module.device)
    with serving(_Positioned(step, torch.arange(len(token_ids), device=module.device))):
        module(input_ids=ids, decoder_input_ids=ids, use_cache=False)


class _DecoderProbe(EncoderDecoderCache, PackedStep):  # type: ignore[misc]  # as a DecoderStep
    """Takes the place of the pool in one forward and records what each layer of the decoder does."""

    def __init__(self, device: torch.device) -> None:
        PackedStep.__init__(self)
        self.positions = torch.zeros(1, dtype=torch.long, device=device)
        self.is_updated = {}
        self.events: list[tuple[str, int]] = []
        self.shapes: dict[int, set[LayerShape]] = {}
        self.self_attention_cache = _ProbeCache(self, "answer")  # type: ignore[assignment]
        self.cross_attention_cache = _ProbeCache(self, "source")  # type: ignore[assignment]

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        raise AssertionError("the parts store")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        looks_at = "source" if is_view_of_source(mask) else "answer"
        self.events.append((f"attends to the {looks_at}", self.events[-1][1] if self.events else -1))
        seen = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=query.device)
        return attention.attend(query, key, value, seen, options).transpose(1, 2)


class _ProbeCache(StepCache):
    def __init__(self, probe: _DecoderProbe, of: str) -> None:
        self._probe, self._of = probe, of

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self._probe.events.append((f"stores the {self._of}", layer_idx))
        shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self._probe.shapes.setdefault(layer_idx, set()).add(shape)
        return key, value


def _probe_layers(model: LoadedModel) -> list[LayerShape]:
    source = probe_prompts(model)[0]
    states = encode(model.module, EncoderStep([len(source)], model.device), source)
    probe = _DecoderProbe(model.device)
    decode(model.module, probe, [start_token_of(model)], states)
    layers = len(probe.shapes)
    each = ("stores the answer", "attends to the answer", "stores the source", "attends to the source")
    if not layers or probe.events != [(event, layer) for layer in range(layers) for event in each]:
        raise UnsupportedModelError(
            "each layer of the decoder must store and attend to the answer and then the source, each once"
        )
    if any(len(shapes) > 1 for shapes in probe.shapes.values()):
        raise UnsupportedModelError("a layer's K and V of the source have another shape than those of the answer")
    return [probe.shapes[layer].pop() for layer in range(layers)]


def _answer(model: LoadedModel, number: int) -> list[int]:
    """Return what the decoder is given in a trial: its own first token and some others."""
    return [start_token_of(model), *((5 * at + number + 1) % model.vocabulary for at in range(1, _ANSWER))]


def _own_logits(model: LoadedModel, source: list[int]) -> Tensor:
    """Return the logits after each token of an answer to ``source`` by the model's own attention, float32 of shape (tokens,
    vocabulary)."""
    ids = torch.tensor([source], device=model.device)
    states = model.module.get_encoder()(input_ids=ids)[0]
    cache = {cache_argument(model.module): EncoderDecoderCache(DynamicCache(), DynamicCache())}
    logits = []
    for token in _answer(model, source[0]):  # one by one, as it is generated
        output = model.module(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=torch.tensor([[token]], device=model.device),
            use_cache=True,
            **cache,
        )
        logits.append(output.logits[0, 0].float())
    return torch.stack(logits)


def _served_logits(
    model: LoadedModel,
    layers: Sequence[LayerShape],
    sources: Sequence[list[int]],
    kernels: PoolKernels = PoolKernels(),  # noqa: B008  # it is immutable
    block_tokens: int | None = None,
) -> list[Tensor]:
    """Return the logits after each token of an answer to each of ``sources``, float32 of shape (tokens, vocabulary) each:
    the sources are encoded packed, and each step decodes the answers that are not complete, the first of which is a token
    ahead of the second. Each request lies in blocks of ``block_tokens`` tokens, by default in a single one."""
    longest = max(map(len, sources)) + _ANSWER
    size = block_tokens or longest
    each = -(-longest // size)
    pool = KVPool(layers, len(sources) * each, size, model.dtype, model.device, kernels=kernels)
    blocks = [range(number * each, (number + 1) * each) for number in range(len(sources))]
    prompts = [Segment(own, len(source), len(source)) for own, source in zip(blocks, sources, strict=True)]
    answers = [_answer(model, source[0]) for source in sources]
    tokens = [token for source in sources for token in source]
    logits = [[row] for row in prefill_logits(model, pool, prompts, tokens, [])]

    def step(requests: list[int]) -> None:
        drawn = [len(logits[number]) for number in requests]
        segments = [
            Segment(blocks[number], len(sources[number]) + done + 1, 1, first=len(sources[number]))
            for number, done in zip(requests, drawn, strict=True)
        ]
        inputs = [answers[number][done] for number, done in zip(requests, drawn, strict=True)]
        for number, row in zip(requests, decode_logits(model, pool, segments, inputs), strict=True):
            logits[number].append(row)

    step([0])
    while waiting := [number for number, rows in enumerate(logits) if len(rows) < _ANSWER]:
        step(waiting)
    return [torch.stack(rows).float() for rows in logits]


_ENCODER_DECODER = Attachment(
    find_problem=_find_problem,
    compare=_compare,
    replace_attention=_replace_attention,
    probe_layers=_probe_layers,
    run=run_both_halves,
    embeddings=lambda module: {half.get_input_embeddings() for half in _halves(module)},
    explain=cannot_be_served,
    kernels=("decode",),
    packed_logits=_served_logits,
)
