"""What every engine over the KV pool needs before its workers: the model attached, its pool planned, kernels chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from splitwiser import packed
from splitwiser.decode_kernel import DecodeKernel, load_kernel
from splitwiser.engine import EngineSettings
from splitwiser.fused import describe_parts
from splitwiser.guard import attach_engine
from splitwiser.kv_pool import KVPool, LayerShape, plan_blocks
from splitwiser.model import LoadedModel
from splitwiser.system import keep_freed_memory


@dataclass(frozen=True)
class Prepared:
    """The layers' shapes, the pool's number of blocks, what reads it in decode steps, and the kernels in words by what they
    compute, for a run's record."""

    layers: list[LayerShape]
    blocks: int
    kernel: DecodeKernel | None
    kernels: dict[str, str]


def prepare(model: LoadedModel, settings: EngineSettings) -> Prepared:
    """Attach the engine to ``model`` and plan. Raises as :func:`splitwiser.guard.attach_engine`,
    :func:`splitwiser.kv_pool.plan_blocks` and :func:`splitwiser.decode_kernel.load_kernel` do."""
    kernel, decode_attention = load_kernel(settings.kernels, model.device)
    unpacked = _why_not_packed(model, settings.kernels)
    layers = attach_engine(model, pack=unpacked is None)
    blocks = plan_blocks(
        layers,
        settings.kv_memory,
        settings.block_tokens,
        model.dtype,
        model.device,
        settings.max_batch,
        model.max_positions,
    )
    if model.device.type == "cpu":
        keep_freed_memory()
    described = {
        "linear_layers": f"PyTorch's own ({unpacked})" if unpacked else "oneDNN's, weights packed once",
        "fused_parts": f"none ({unpacked})" if unpacked else describe_parts(model.module),
        "prefill_attention": "torch.nn.functional.scaled_dot_product_attention",
        "decode_attention": decode_attention,
    }
    return Prepared(layers, blocks, kernel, described)


def make_pool(model: LoadedModel, prepared: Prepared, settings: EngineSettings, memory: Tensor | None = None) -> KVPool:
    """The pool that was planned, in ``memory`` or in its own."""
    return KVPool(
        prepared.layers, prepared.blocks, settings.block_tokens, model.dtype, model.device, memory, prepared.kernel
    )


def _why_not_packed(model: LoadedModel, kernels: str) -> str | None:
    if kernels == "plain":
        return "as asked for"
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return "packing is for bfloat16 on a CPU"
    return packed.find_problem()
