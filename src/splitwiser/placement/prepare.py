"""What every mode needs before its workers: the model loaded and, over a KV pool, attached, its pool planned, kernels
chosen."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from splitwiser import constants
from splitwiser.engine.engine import Engine
from splitwiser.engine.worker import Scheduling
from splitwiser.machine.process import keep_freed_memory
from splitwiser.model.compatibility import attach_engine, try_kernels
from splitwiser.model.fusing import describe_parts
from splitwiser.model.kernels import packed_linear as packed
from splitwiser.model.kernels.choose import load_kernels
from splitwiser.model.kernels.interface import LayerShape, PoolKernels
from splitwiser.model.kv_pool import KVPool, plan_blocks
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.placement.config import EngineConfig, ModelConfig

_COMPUTED_BY = {"decode": "decode_attention", "varlen": "prefill_attention"}  # what a run's record calls it


@dataclass(frozen=True)
class Started:
    """A model with a running engine, and what a run's record says of it: the pool, which kernels serve, by level of the
    division of compute how many units (cores, multiprocessors) each worker has, and the MPS daemon of mode ``mps``."""

    model: LoadedModel
    engine: Engine | None  # None: it was closed
    pool: KVPool | None
    kernels: dict[str, str]
    division: list[dict[str, int]]
    mps: dict[str, Any] | None = None


@dataclass(frozen=True)
class Prepared:
    """The layers' shapes, the pool's number of blocks, the kernels over it, those of them (fields of
    :class:`~splitwiser.model.kernels.interface.PoolKernels`) that a trial refused, and all kernels in words by what they
    compute, for a run's record."""

    layers: list[LayerShape]
    blocks: int
    kernels: PoolKernels
    refused_kernels: tuple[str, ...]
    described: dict[str, str]


def load(config: ModelConfig, device: str | None = None) -> LoadedModel:
    """Load ``config``'s model, onto ``device`` instead of its own if given. Raises as
    :func:`splitwiser.model.loading.load_model`."""
    return load_model(
        config.model,
        dtype=config.dtype,
        device=device or config.device_name,
        load_format=config.load_format,
        seed=config.seed,
        kv_memory=config.kv_memory,
    )


def scheduling_of(config: EngineConfig) -> Scheduling:
    """Return what of ``config`` the workers schedule by."""
    return Scheduling(config.max_batch, config.prefill_tokens, constants.BLOCK_TOKENS)


def prepare(model: LoadedModel, config: EngineConfig) -> Prepared:
    """Attach the engine to ``model`` and plan. Raises as :func:`splitwiser.model.compatibility.attach_engine`,
    :func:`splitwiser.model.kv_pool.plan_blocks` and :func:`splitwiser.model.kernels.choose.load_kernels` do."""
    unpacked = _why_not_packed(model, config.kernels)
    layers = attach_engine(model, pack=unpacked is None)
    kernels, attention = load_kernels(config.kernels, model.device, model.dtype, layers)
    refused = try_kernels(model, layers, kernels, constants.BLOCK_TOKENS) if model.device.type == "cuda" else {}
    kernels = replace(kernels, **dict.fromkeys(refused))
    attention |= {_COMPUTED_BY[name]: f"PyTorch's ({name} kernel: {reason})" for name, reason in refused.items()}
    blocks = plan_blocks(
        layers,
        config.kv_memory,
        constants.BLOCK_TOKENS,
        model.dtype,
        model.device,
        config.max_batch,
        model.max_positions,
    )
    if model.device.type == "cpu":
        keep_freed_memory()
    described = {
        "linear_layers": f"PyTorch's own ({unpacked})" if unpacked else packed.describe(),
        "fused_parts": f"none ({unpacked})" if unpacked else describe_parts(model.module),
        **attention,
    }
    return Prepared(layers, blocks, kernels, tuple(refused), described)


def make_pool(model: LoadedModel, prepared: Prepared, memory: Tensor | None = None) -> KVPool:
    """Make the pool that was planned, in ``memory`` or in its own."""
    pool = KVPool(
        prepared.layers, prepared.blocks, constants.BLOCK_TOKENS, model.dtype, model.device, memory, prepared.kernels
    )
    if memory is None:  # the workers that share it take their own parts
        pool.prefault(range(prepared.blocks))
    return pool


def _why_not_packed(model: LoadedModel, kernels: str) -> str | None:
    if kernels == "plain":
        return "as asked for"
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return "packing is for bfloat16 on a CPU"
    return packed.find_packing_problem()
