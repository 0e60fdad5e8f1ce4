"""Makes a model serve adapters: LoRA parts at its layers, virtual tokens in its KV pool, and the proof of both."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from splitwiser.errors import InputError, UnsupportedModelError, first_line
from splitwiser.model.adapters.files import AdapterFiles
from splitwiser.model.adapters.loaded import KeysValues, LoadedAdapter
from splitwiser.model.adapters.lora import add_lora
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kv_pool import KVPool
from splitwiser.model.loading import LoadedModel
from splitwiser.model.paged_attention import Segment
from splitwiser.model.rotary import depends_on_length
from splitwiser.model.routes import ROUTES
from splitwiser.model.trials import agree
from splitwiser.request import Adapter

# relative to the largest logit: half precisions differ by rounding, beside which an adapter of small effect is not seen
_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}


def attach_adapters(model: LoadedModel, files: Sequence[AdapterFiles], merge: bool) -> list[LoadedAdapter]:
    """Load adapters and make ``model``, whose attention must still be its own, compute with those of LoRA: beside its
    layers, or ``merge``d into its weights. Raises :class:`InputError` for one that does not fit."""
    if not files:
        return []
    from splitwiser.model.adapters.reading import load_adapter  # imports peft, which takes seconds

    for each in files:
        if each.virtual_tokens and depends_on_length(model.module):
            raise InputError(
                f"--adapter {each.name}: virtual tokens are not served in a model that rotates positions by the length of a "
                "request (dynamic NTK, longrope); use --mode generate"
            )
    loaded = [load_adapter(model, each, merge) for each in files]
    add_lora(model.module, [each.parts for each in loaded if each.parts])
    model.weights += f"; adapters {[each.describe_weights() for each in files]}, merged: {merge}"
    return loaded


def blocks_of(files: AdapterFiles, block_tokens: int) -> int:
    """Return the number of blocks that an adapter's virtual tokens take."""
    return -(-files.virtual_tokens // block_tokens)


def place_adapters(loaded: Sequence[LoadedAdapter], first_block: int, block_tokens: int) -> dict[str, Adapter]:
    """Return ``loaded`` as requests carry them, by name, with blocks for virtual tokens from ``first_block`` on."""
    placed: dict[str, Adapter] = {}
    loras = 0
    for each in loaded:
        name, tokens = each.files.name, each.files.virtual_tokens
        loras += bool(each.parts)
        blocks = range(first_block, first_block + blocks_of(each.files, block_tokens))
        placed[name] = Adapter(name, loras if each.parts else 0, tokens, tuple(blocks), tokens % block_tokens)
        first_block = blocks.stop
    return placed


@torch.inference_mode()
def write_virtual_tokens(pool: KVPool, adapters: Mapping[str, Adapter], loaded: Sequence[LoadedAdapter]) -> None:
    """Write the K and V of all virtual tokens to the blocks of ``pool`` that ``adapters`` names. Returns once the device has
    finished."""
    for each in loaded:
        if each.keys_values:
            _write(pool, adapters[each.files.name].blocks, each.keys_values)
    if pool.keys[0].is_cuda:
        torch.cuda.synchronize(pool.keys[0].device)  # workers read from other streams


def _write(pool: KVPool, blocks: Sequence[int], keys_values: KeysValues) -> None:
    size = pool.block_tokens
    tokens = keys_values[0][0].shape[1]
    slots = torch.tensor([blocks[at // size] * size + at % size for at in range(tokens)], device=pool.keys[0].device)
    for layer, (keys, values) in enumerate(keys_values):
        pool.write(layer, slots, *(each.transpose(0, 1).contiguous() for each in (keys, values)))


@torch.inference_mode()
def try_adapters(
    model: LoadedModel,
    layers: Sequence[LayerShape],
    loaded: Sequence[LoadedAdapter],
    block_tokens: int,
    kernels: PoolKernels,
) -> None:
    """Raise :class:`InputError` unless ``model``, which the engine is attached to, gives with each of its adapters the
    logits that peft's own model gives, in a prefill step and in a decode step after it."""
    for each in loaded:
        name = each.files.name
        try:
            problem = _find_shape_problem(layers, each) or _find_problem(
                model, layers, each, model.adapters[name], block_tokens, kernels
            )
        except UnsupportedModelError as error:
            problem = first_line(error)
        if problem:
            raise InputError(f"--adapter {name} cannot be served by the engine: {problem}; use --mode generate")


def _find_shape_problem(layers: Sequence[LayerShape], loaded: LoadedAdapter) -> str | None:
    """Return how the shape of virtual tokens' K and V differs from what the layers store; None if it does not."""
    stored = [((each.kv_heads, each.key_dim), (each.kv_heads, each.value_dim)) for each in layers]
    given = [tuple((part.shape[0], part.shape[2]) for part in pair) for pair in loaded.keys_values]
    if not given or given == stored:
        return None
    return (
        f"it has K and V for {len(given)} layers, of (heads, size) {given[0]} in the first, and the model for {len(stored)} "
        f"and {stored[0]}"
    )


def _find_problem(
    model: LoadedModel,
    layers: Sequence[LayerShape],
    loaded: LoadedAdapter,
    adapter: Adapter,
    block_tokens: int,
    kernels: PoolKernels,
) -> str | None:
    """Return how logits with ``adapter``, computed over a small pool, differ from peft's; None if they do not."""
    prompt, encoded = loaded.prompt, model.encodes
    context = adapter.virtual_tokens + len(prompt)
    own = range(-(-(adapter.tail_tokens + len(prompt) + 1 + encoded) // block_tokens))
    adapter = replace(adapter, blocks=tuple(range(len(own), len(own) + len(adapter.blocks))))
    pool = KVPool(
        layers, len(own), block_tokens, model.dtype, model.device, kernels=kernels, shared_blocks=len(adapter.blocks)
    )
    write_virtual_tokens(pool, {adapter.name: adapter}, [loaded])
    if adapter.tail_tokens:
        pool.copy_tokens(adapter.blocks[-1], own[0], adapter.tail_tokens)
    route = ROUTES[model.kind]
    whole = Segment([*adapter.shared_blocks, *own], context, len(prompt), lora=adapter.lora)
    # an encoder-decoder's answer begins behind the source, with a token of its own
    one = replace(whole, context=context + 1 + encoded, tokens=1, first=context if encoded else 0)
    first = route.prefill(model, pool, [whole], prompt, [len(prompt) - 1])
    second = route.decode(model, pool, [one], [loaded.next_token])
    if agree(torch.cat([first, second]).float(), loaded.logits, _BOUNDS[model.dtype]):
        return None
    return "it gives other logits than peft's own model"
