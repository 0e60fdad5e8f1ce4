"""Preparation that all modes share: load the model, attach the engine to it, choose kernels and plan the KV pool."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from splitwiser import constants
from splitwiser.engine.engine import Engine
from splitwiser.engine.messages import WorkerSpec
from splitwiser.engine.policy import find_policy
from splitwiser.engine.schedule import find_schedule, saturating_tokens
from splitwiser.engine.steps import ModelStepper
from splitwiser.engine.worker import SchedulerSettings
from splitwiser.errors import InputError
from splitwiser.machine.pages import gather, keep_freed_memory
from splitwiser.model.adapters.loaded import LoadedAdapter
from splitwiser.model.adapters.serving import (
    attach_adapters,
    blocks_of,
    place_adapters,
    try_adapters,
    write_virtual_tokens,
)
from splitwiser.model.dispatch.table import describe_route
from splitwiser.model.fusing import describe_parts
from splitwiser.model.kernels import int8_linear as int8
from splitwiser.model.kernels import packed_linear as packed
from splitwiser.model.kernels.choose import load_kernels
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kv_pool import KVPool, plan_blocks, stored_dtype
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.model.paged_attention import Segment
from splitwiser.model.rotary import length_without_scaling
from splitwiser.model.routes import ROUTES
from splitwiser.placement.config import EngineConfig, ModelConfig
from splitwiser.request import Request

PROBE_TOKENS = 32  # of the prompt that shows what int8 weights, and K and V in another number format, change
_COMPUTED_BY = {"decode": "decode_attention", "varlen": "prefill_attention"}  # names in a run's record


@dataclass(frozen=True)
class StartedEngine:
    """A model with a running engine, and facts for the run's record: the KV pool, the kernels in use, the units (cores,
    multiprocessors) of each worker by level of the division, the MPS daemon of mode ``mps``, and another back end.
    ``find_request_problem`` returns why the engine cannot serve a request that the model has room for, or None."""

    model: LoadedModel
    engine: Engine | None  # None once closed
    pool: KVPool | None
    kernels: dict[str, str]
    division: list[dict[str, int]]
    mps: dict[str, Any] | None = None
    backend: dict[str, Any] | None = None
    find_request_problem: Callable[[Request], str | None] = lambda _: None


@dataclass(frozen=True)
class PreparedModel:
    """Plan of a model's KV pool: shapes of the layers, what they are ``stored`` as, number of blocks for requests and, after
    these, of ``shared_blocks`` for the virtual tokens of ``adapters``, and kernels over it.

    ``refused_kernels`` are the kernels (fields of :class:`~splitwiser.model.kernels.interface.PoolKernels`) that failed a
    trial; ``described`` names all kernels by what they compute, for the run's record.
    """

    layers: list[LayerShape]
    stored: torch.dtype
    blocks: int
    shared_blocks: int
    kernels: PoolKernels
    refused_kernels: tuple[str, ...]
    described: dict[str, str]
    adapters: Sequence[LoadedAdapter]


def load(config: ModelConfig, device: str | None = None) -> LoadedModel:
    """Load ``config``'s model onto ``device``, by default ``config``'s. Raises the errors of
    :func:`splitwiser.model.loading.load_model`."""
    return load_model(
        config.model,
        models=config.models,
        dtype=config.dtype,
        device=device or config.device_name,
        load_format=config.load_format,
        seed=config.seed,
        kv_memory=config.kv_memory,
    )


def scheduler_settings(config: EngineConfig, model: LoadedModel) -> SchedulerSettings:
    """Return the limits, the policy and the schedule of ``config`` that workers serve ``model`` by."""
    return SchedulerSettings(
        config.max_batch,
        config.step_tokens,
        constants.BLOCK_TOKENS,
        find_policy(config.policy),
        find_schedule(config.schedule),
        None if config.itl_target_ms is None else config.itl_target_ms / 1e3,
        config.reserve,
        bool(config.prefix_caching),
        length_without_scaling(model.module),
    )


def measure_budget(config: EngineConfig, spec: WorkerSpec, stepper: ModelStepper) -> tuple[int, dict[str, str]]:
    """Return the budget of the steps of a worker, and where it is measured, what it is, for the run's record."""
    most = config.step_tokens
    if spec.role != "mixed" or not config.measures_budget:
        return most, {}
    budget = saturating_tokens(stepper.measure_prefill, most)
    return budget, {f"{spec.name}_budget": f"{budget} tokens a step, by the times of prefill steps at its start"}


def takes_second_lane(model: LoadedModel) -> bool:
    """Return whether two prefill steps of ``model`` may run at a time in one process, and gain by that: on a GPU they do
    not, and rotary modules that scale by length keep the last one as their state. Encoder-decoders have not been tried."""
    return model.device.type == "cpu" and not model.encodes and math.isinf(length_without_scaling(model.module))


def prepare(model: LoadedModel, config: EngineConfig) -> PreparedModel:
    """Attach adapters and the engine to ``model``, choose kernels and plan the KV pool.

    Raises the errors of :func:`splitwiser.model.adapters.serving.attach_adapters`, of its
    :class:`~splitwiser.model.routes.Route`'s ``attach``, of
    :func:`splitwiser.model.kv_pool.plan_blocks` and :func:`splitwiser.model.kernels.choose.load_kernels`.
    """
    if model.encodes and config.prefix_caching:
        model.notes.append("prefix caching is for decoders: an encoder reads each source as a whole")
    stored, on_gpu = stored_dtype(config.kv_dtype, model.dtype), model.device.type == "cuda"
    if on_gpu and stored != model.dtype:
        raise InputError(f"--kv_dtype {config.kv_dtype} is for a CPU; on a GPU leave it out, and K and V have --dtype")
    adapters = attach_adapters(model, list(config.adapter_files.values()), config.merge_adapter)
    unpacked, unfused = _why_not_packed(model, config.kernels), _why_not_fused(model, config.kernels)
    route = ROUTES[model.kind]
    if config.quantization != "none" and unpacked:
        raise InputError(f"--quantization {config.quantization}: {unpacked}")
    layers = route.attach(model, pack=unfused is None, remember=True)
    quantised = _quantise(model, layers) if config.quantization != "none" else None
    compressed = "" if quantised or unpacked else packed.compress_linears(model.module)
    kernels, attention = load_kernels(config.kernels, model.device, stored, layers)
    if config.kv_dtype != "auto":
        attention["kv_pool"] = _describe_stored(model, layers, stored)
    refused = route.try_kernels(model, layers, kernels, constants.BLOCK_TOKENS) if on_gpu else {}
    kernels = replace(kernels, **dict.fromkeys(refused))
    attention |= {_COMPUTED_BY[name]: f"PyTorch's ({name} kernel: {reason})" for name, reason in refused.items()}
    if route.prefill_attention:
        attention["prefill_attention"] = route.prefill_attention
    blocks = plan_blocks(
        layers,
        config.kv_memory,
        constants.BLOCK_TOKENS,
        stored,
        model.device,
        config.max_batch,
        model.longest_request,
    )
    shared = sum(blocks_of(each.files, constants.BLOCK_TOKENS) for each in adapters)
    if shared >= blocks:
        raise InputError(
            f"--kv_memory '{config.kv_memory}' holds {blocks} blocks, and the virtual tokens of adapters take {shared}, "
            "which leaves none for requests"
        )
    model.adapters = place_adapters(adapters, blocks - shared, constants.BLOCK_TOKENS)
    # over K and V in the model's own number format, since others change logits
    try_adapters(model, layers, adapters, constants.BLOCK_TOKENS, kernels if stored == model.dtype else PoolKernels())
    if model.device.type == "cpu":
        keep_freed_memory()
    described = {
        "route": describe_route(model.module),
        "linear_layers": quantised or (f"PyTorch's own ({unpacked})" if unpacked else packed.describe() + compressed),
        "fused_parts": f"none ({unfused})" if unfused else describe_parts(model.module),
        **attention,
    }
    return PreparedModel(layers, stored, blocks - shared, shared, kernels, tuple(refused), described, adapters)


def prepare_alone(model: LoadedModel, config: EngineConfig) -> PreparedModel:
    """:func:`prepare` ``model`` for this process alone; on a CPU its weights lie in huge pages then."""
    prepared = prepare(model, config)
    if model.device.type == "cpu":
        gather(model.module)
    return prepared


def make_pool(model: LoadedModel, prepared: PreparedModel, memory: Tensor | None = None) -> KVPool:
    """Create the planned KV pool, in ``memory`` if given, with the virtual tokens of adapters in it."""
    pool = KVPool(
        prepared.layers,
        prepared.blocks,
        constants.BLOCK_TOKENS,
        prepared.stored,
        model.device,
        memory,
        prepared.kernels,
        prepared.shared_blocks,
    )
    write_virtual_tokens(pool, model.adapters, prepared.adapters)
    return pool


def _quantise(model: LoadedModel, layers: Sequence[LayerShape]) -> str:
    """Give ``model`` int8 weights; returns what computes them and what that changes, for the run's record."""
    before = _probe_logits(model, layers, model.dtype)
    count = int8.quantise_linears(model.module)
    change = _describe_change(before, _probe_logits(model, layers, model.dtype))
    return f"{int8.describe()}, int8, {count} layers; {change}"


def _describe_stored(model: LoadedModel, layers: Sequence[LayerShape], stored: torch.dtype) -> str:
    """Return what the KV pool of ``model`` stores and what that changes, for the run's record."""
    before, after = (_probe_logits(model, layers, dtype) for dtype in (model.dtype, stored))
    return f"{str(stored).removeprefix('torch.')}; {_describe_change(before, after)}"


def _describe_change(before: Tensor, after: Tensor) -> str:
    """Return by how much logits of :func:`_probe_logits` differ."""
    error = float((after - before).norm() / before.norm())
    same = float((after.argmax(dim=-1) == before.argmax(dim=-1)).float().mean())
    return (
        f"over {PROBE_TOKENS} random tokens logits change by {error:.1%} (relative norm), and {same:.0%} of the likeliest "
        "tokens stay"
    )


@torch.inference_mode()
def _probe_logits(model: LoadedModel, layers: Sequence[LayerShape], stored: torch.dtype) -> Tensor:
    """Return logits of a prompt of random tokens, the same ones each time, over a pool of ``stored``: (rows, vocabulary), a
    row for each token of a decoder and one for an encoder-decoder."""
    tokens = torch.randint(model.vocabulary, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    blocks = -(-(PROBE_TOKENS + model.encodes) // constants.BLOCK_TOKENS)
    pool = KVPool(layers, blocks, constants.BLOCK_TOKENS, stored, model.device)
    prompt = Segment(range(blocks), PROBE_TOKENS, PROBE_TOKENS, PROBE_TOKENS)
    rows = [PROBE_TOKENS - 1] if model.encodes else range(PROBE_TOKENS)
    return ROUTES[model.kind].prefill(model, pool, [prompt], tokens, rows).float()


def _why_not_fused(model: LoadedModel, kernels: str) -> str | None:
    """Return why modules stay transformers' own, or None if fused ones take their place."""
    if model.device.type != "cuda" or kernels == "plain":
        return _why_not_packed(model, kernels)
    return "fusing is for half precisions" if model.dtype == torch.float32 else None


def _why_not_packed(model: LoadedModel, kernels: str) -> str | None:
    """Return why linear layers keep PyTorch's weights instead of packed ones, or None if they are packed."""
    if kernels == "plain":
        return "as asked for"
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return "packing is for bfloat16 on a CPU"
    return packed.find_packing_problem()
