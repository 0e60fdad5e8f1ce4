"""The two phases of an encoder-decoder over packed requests: prefill encodes their sources and makes the first token of each
answer, decode makes the next one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from splitwiser.model.attention import serving
from splitwiser.model.fixed_step import FixedDecodeStep
from splitwiser.model.forward import cache_argument, on_device
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import Segment, find_loras
from splitwiser.model.seq2seq.steps import DecoderStep, EncoderStep, FixedSources, PackedStep, paged_step


def prefill_logits(
    model: LoadedModel, pool: KVPool, segments: Sequence[Segment], token_ids: Sequence[int], _: Sequence[int]
) -> Tensor:
    """Encode the sources of ``segments``, whole prompts packed as ``token_ids``, store their K and V and those of the
    decoder's first token, and return the logits after it: (requests, vocabulary)."""
    lengths = [each.tokens for each in segments]
    states = encode(model.module, EncoderStep(lengths, model.device, find_loras(segments, model.device)), token_ids)
    starts = [Segment(each.blocks, each.context + 1, 1, lora=each.lora, first=each.context) for each in segments]
    step = paged_step(pool, starts, model.device, stores_sources=True)
    return decode(model.module, step, [start_token_of(model)] * len(segments), states)


def decode_logits(
    model: LoadedModel, pool: KVPool, segments: Sequence[Segment], token_ids: Sequence[int] | Tensor
) -> Tensor:
    """Store K and V of ``token_ids``, one of each segment, and return the logits after it: (requests, vocabulary)."""
    step = paged_step(pool, segments, model.device, stores_sources=False)
    return decode(model.module, step, token_ids, no_states(model.module))


def hybrid_logits(
    model: LoadedModel,
    pool: KVPool,
    sources: Sequence[Segment],
    source_tokens: Sequence[int],
    ends: Sequence[int],
    decoding: Sequence[Segment],
    last_tokens: Sequence[int],
) -> Tensor:
    """Run :func:`prefill_logits` of ``sources`` and :func:`decode_logits` of ``decoding`` one after the other, and return
    the logits of both: the encoder has weights of its own, so that most of one forward would not be shared with decode."""
    first = prefill_logits(model, pool, sources, source_tokens, ends)
    return torch.cat([first, decode_logits(model, pool, decoding, last_tokens)])


def fixed_logits(model: LoadedModel, step: FixedDecodeStep) -> Tensor:
    """Return the logits after each token of ``step``, (requests, vocabulary)."""
    return decode(
        model.module, DecoderStep(step, FixedSources(step), step.positions), step.tokens, no_states(model.module)
    )


def encode(module: PreTrainedModel, step: EncoderStep, token_ids: Sequence[int] | Tensor) -> Tensor:
    """Return the encoder's states of packed ``token_ids``, (1, tokens, hidden size)."""
    with on_device(module.device), serving(step):
        states: Tensor = module.get_encoder()(input_ids=torch.as_tensor(token_ids, device=module.device)[None])[0]
    return states


def decode(module: PreTrainedModel, step: PackedStep, token_ids: Sequence[int] | Tensor, states: Tensor) -> Tensor:
    """Return the decoder's logits after packed ``token_ids``, (tokens, vocabulary); its layers make K and V of ``states`` if
    ``step`` stores them."""
    with on_device(module.device), serving(step):
        output = module(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=torch.as_tensor(token_ids, device=module.device)[None],
            use_cache=True,
            **{cache_argument(module): step},
        )
    logits: Tensor = output.logits[0]
    return logits


def no_states(module: PreTrainedModel) -> Tensor:
    """Return states that no layer reads, which tell the decoder that there was an encoder."""
    return torch.empty(1, 1, module.config.hidden_size, dtype=module.dtype, device=module.device)


def start_token_of(model: LoadedModel) -> int:
    """Return the token that the answers of ``model``, an encoder-decoder, begin with."""
    assert model.start_token_id is not None
    return model.start_token_id
