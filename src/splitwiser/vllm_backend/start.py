"""Starts vLLM's engines: one (``sequential``), several whole ones, or prefill and decode engines (``mp``, ``mps``)."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from splitwiser import constants
from splitwiser.elsewhere import PROGRAM
from splitwiser.engine.engine import SplitEngine
from splitwiser.engine.messages import PARENT
from splitwiser.errors import InputError
from splitwiser.machine.device import resolve_device
from splitwiser.machine.memory import free_memory
from splitwiser.machine.pages import map_memory, return_freed_memory
from splitwiser.machine.process import temporary_folder
from splitwiser.model.checkpoints.catalog import decoders_only, resolve_model
from splitwiser.model.checkpoints.configuration import without_bars
from splitwiser.model.checkpoints.weights import weights_nbytes
from splitwiser.model.kernels.interface import LayerShape
from splitwiser.model.kv_pool import block_nbytes, find_pool_problem, plan_blocks
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.placement.checks import refuse_mode_here
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.cores import plan_cores, plan_threads
from splitwiser.placement.mailbox import PipeInbox, open_pipes
from splitwiser.placement.mps import provide_daemon
from splitwiser.placement.mps_daemon import MpsDaemon
from splitwiser.placement.prepare import StartedEngine
from splitwiser.placement.shares import Board
from splitwiser.request import Request
from splitwiser.text import parse_bytes, parse_device
from splitwiser.vllm_backend.environment import Environment, find_environment, worker_environment
from splitwiser.vllm_backend.messages import EngineOptions, EngineSetup, SharedFile
from splitwiser.vllm_backend.placement import EnginePlacement
from splitwiser.vllm_backend.spawned import SpawnedProcess

_UNLIMITED = 8192  # tokens of the longest request of a model that has no limit


def start(config: EngineConfig, undo: ExitStack) -> StartedEngine:
    """See :meth:`splitwiser.placement.start.ModeModule.start`."""
    began = time.perf_counter()
    environment = find_environment(config.backend_python)
    refuse_mode_here(config.mode, config.device_name)
    if parse_device(config.device_name)[1]:
        raise InputError(
            f"backend vllm runs on the first GPU, not on {config.device_name}; set CUDA_VISIBLE_DEVICES to that one"
        )
    daemon, mps = provide_daemon(config, undo) if config.mode == "mps" else (None, None)
    with ExitStack() as until_ready:
        model, location = _load(config, until_ready)
        if model.encodes:
            raise decoders_only(model.name, "backend vllm")
        if problem := environment.find_problem(model.device.type):
            raise InputError(f"backend vllm: {problem}")
        if environment.note:
            model.notes.append(environment.note)
        placement = _start_engines(config, model, location, environment, daemon)
    model.load_s = time.perf_counter() - began  # vLLM reads the weights and compiles the model in one
    engines = placement.engines
    if config.prefix_caching and not any(ready.settings["prefix_caching"] for ready in engines.values()):
        model.notes.append("vLLM does not keep the blocks of this kind of model for prompts that begin alike")
    capacity = min(each.longest for each in engines.values()) - 1  # vLLM counts the last token too, which is not stored
    threads = {name: int(ready.settings["threads"]) for name, ready in engines.items()}
    return StartedEngine(
        model,
        SplitEngine(model.decode, placement, capacity),
        None,
        dict.fromkeys(("prefill_attention", "decode_attention"), "vLLM's own"),
        [threads] if model.device.type == "cpu" else [],
        mps,
        backend={
            "name": config.backend,
            "python": str(environment.python),
            "versions": environment.versions,
            "engines": {name: dict(ready.settings) for name, ready in engines.items()},
        },
        find_request_problem=lambda request: _find_request_problem(request, config),
    )


def _load(config: EngineConfig, until_ready: ExitStack) -> tuple[LoadedModel, str]:
    """Return what is known of the model here, without its weights, and where vLLM reads it from: a temporary checkpoint,
    which ``until_ready`` deletes, if there is no other, since its weights are random or a GGUF file's."""
    entry = resolve_model(config.model, config.models)
    written = config.load_format == "dummy" or entry.gguf is not None
    model = load_model(
        config.model,
        models=config.models,
        dtype=config.dtype,
        device="cpu" if written else config.device_name,
        load_format=config.load_format,
        seed=config.seed,
        weights=written,
    )
    if not written:
        return model, entry.location
    folder = until_ready.enter_context(temporary_folder())
    with without_bars():
        model.module.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    torch.nn.Module.to(model.module, "meta")
    model.device = resolve_device(config.device_name)
    return_freed_memory()
    return model, folder


def _start_engines(
    config: EngineConfig, model: LoadedModel, location: str, environment: Environment, daemon: MpsDaemon | None
) -> EnginePlacement:
    """Start a worker for each engine, all clients of ``daemon`` if there is one, and return when all are ready."""
    specs = config.specs
    cores = sorted(os.sched_getaffinity(0))
    parts, threads = _divide(config, cores, model.device)
    handing_over = any(spec.role != "mixed" for spec in specs)
    one_pool = handing_over and config.kv_transfer == "shared"
    kv_bytes = _plan_kv_bytes(config, model) // (1 if one_pool else len(specs))
    options = EngineOptions(
        model=location,
        dtype=str(model.dtype).removeprefix("torch."),
        longest=_UNLIMITED if model.max_positions is None else -1,
        max_batch=config.max_batch,
        prefill_tokens=config.step_tokens,
        kv_bytes=kv_bytes,
        eager=config.kernels == "plain",
        seed=config.seed,
        eos_token_ids=model.eos_token_ids,
        prefix_caching=bool(config.prefix_caching),
        has_tokenizer=model.tokenizer is not None,
    )
    names = [spec.name for spec in specs]
    board = _new_file(Board.nbytes(len(specs)))
    os.ftruncate(board.fd, board.nbytes)
    weights = _new_file(0) if len(specs) > 1 else None
    pools: dict[str, SharedFile] = {}
    if handing_over:
        pools = dict.fromkeys(names, _new_file(kv_bytes)) if one_pool else {name: _new_file(kv_bytes) for name in names}
    sources = {} if one_pool else {spec.name: pools[spec.name] for spec in specs if spec.role == "prefill"}
    files = {board.fd, *(file.fd for file in (weights, *pools.values()) if file is not None)}
    receive_ends, send_ends, parent_ends = open_pipes(names)
    processes = []
    for number, spec in enumerate(specs):
        receive, send = (
            {other: end.fileno() for other, end in ends[spec.name].items()} for ends in (receive_ends, send_ends)
        )
        inherited = [*receive.values(), *send.values(), *files]
        pipes = str(receive.pop(PARENT)), str(send.pop(PARENT))
        command = [str(environment.python), "-P", str(PROGRAM), "splitwiser.vllm_backend.worker", *pipes]
        variables = worker_environment(threads[number], offline=Path(location).exists())
        variables |= daemon.worker_environment(spec, config) if daemon else {}
        processes.append(SpawnedProcess(spec.name, command, variables, parts[number], inherited))
        setup = EngineSetup(
            spec=spec,
            index=number,
            options=options,
            board=board,
            weights=weights,
            pool=pools.get(spec.name),
            first=number / len(specs) if one_pool else 0,
            last=(number + 1) / len(specs) if one_pool else 1,
            sources=sources,
            receive=receive,
            send=send,
        )
        parent_ends[spec.name][0].send(setup)
    for ends in (*receive_ends.values(), *send_ends.values()):
        for end in ends.values():  # the workers have copies of their own, and a pipe closes with the last one
            end.close()
    placement = EnginePlacement(
        specs,
        processes,
        {name: to_worker for name, (to_worker, _) in parent_ends.items()},
        PipeInbox({name: from_worker for name, (_, from_worker) in parent_ends.items()}, on_closed=lambda _: None),
        Board.over(map_memory(board.nbytes, board.fd)),
        daemon,
    )
    try:
        placement.wait_ready()
    except BaseException:
        placement.close()
        raise
    finally:
        for file in files:
            os.close(file)
    return placement


def _new_file(nbytes: int) -> SharedFile:
    """Return an anonymous file for ``nbytes`` bytes, which is empty: the first engine that opens it fills it."""
    return SharedFile(os.memfd_create("splitwiser", os.MFD_CLOEXEC), nbytes)


def _divide(
    config: EngineConfig, cores: Sequence[int], device: torch.device
) -> tuple[list[set[int]], Sequence[int | None]]:
    """Return the cores of each worker and its number of threads. On a GPU all have all cores, which they hardly use, and
    vLLM chooses its number of threads."""
    if device.type != "cpu":
        return [set(cores) for _ in config.specs], [None for _ in config.specs]
    if config.share == "none":
        return [set(cores) for _ in config.specs], [len(cores) for _ in config.specs]
    return plan_cores(config.specs, cores), plan_threads(config.specs, len(cores))


def _plan_kv_bytes(config: EngineConfig, model: LoadedModel) -> int:
    """Return the bytes of all engines' KV caches together; with ``auto``, each has room for ``max_batch`` longest requests,
    if that fits. Raises :class:`InputError` for a size that does not."""
    available = free_memory(model.device)
    if model.device.type == "cuda":  # where nothing but the weights and the KV cache can give way
        available = max(0, available - weights_nbytes(model.module))
    if config.kv_memory != "auto":
        if problem := find_pool_problem(config.kv_memory, available):
            raise InputError(problem)
        return parse_bytes(config.kv_memory)
    text = model.module.config.get_text_config()
    heads: int = getattr(text, "num_attention_heads", None) or 1  # a model without attention has a state of its own
    dim: int = getattr(text, "head_dim", None) or text.hidden_size // heads
    shape = LayerShape(getattr(text, "num_key_value_heads", None) or heads, dim, dim)
    layers = [shape] * text.num_hidden_layers
    block_tokens = constants.BLOCK_TOKENS
    engines = len(config.specs)
    blocks = plan_blocks(
        layers,
        "auto",
        block_tokens,
        model.dtype,
        model.device,
        config.max_batch,
        model.longest_request,
        available // engines,
    )
    return engines * blocks * block_nbytes(layers, block_tokens, model.dtype)


def _find_request_problem(request: Request, config: EngineConfig) -> str | None:
    """Return why vLLM's engines cannot serve ``request``, or None."""
    params = request.params
    if all(spec.role == "mixed" for spec in config.specs):
        return None
    if params.stop:
        return (
            "stop strings may begin in the first token of the answer, which a decode engine of vLLM's takes for the "
            "prompt's; use mixed workers, or stop_token_ids"
        )
    if params.presence_penalty or params.frequency_penalty:
        return (
            "presence_penalty and frequency_penalty count the tokens of the answer, the first of which a decode engine of "
            "vLLM's takes for the prompt's; use mixed workers"
        )
    return None
