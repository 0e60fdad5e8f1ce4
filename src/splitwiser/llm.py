"""The Python API: a model with an engine around it, in the spelling that vLLM's users know."""

import math
import operator
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from splitwiser import constants
from splitwiser.engine.engine import Engine, Observer, check_fits
from splitwiser.engine.generate import GenerateEngine
from splitwiser.errors import InputError, unknown
from splitwiser.machine.device import release_memory
from splitwiser.model.compatibility import padding_changes_tokens
from splitwiser.model.kv_pool import parse_bytes
from splitwiser.model.loading import LoadedModel, load_model
from splitwiser.placement.checks import find_mode_problem
from splitwiser.placement.green import check_layout, start_green
from splitwiser.placement.inline import start_local
from splitwiser.placement.layout import WorkerLayout, parse_layout
from splitwiser.placement.modes import MODES, find_mode
from splitwiser.placement.mps_daemon import MpsDaemon, gpu_index, mps_daemon, thread_percentage
from splitwiser.placement.prepare import EngineSettings, Started
from splitwiser.placement.processes import start_processes, warm_up_start
from splitwiser.placement.shares import ShareSettings
from splitwiser.request import Request, RequestOutput, SamplingParams
from splitwiser.text import check_text
from splitwiser.workload.arrivals import check_arrival

ONE_LENGTH = "prompts of one length at a time: padding may change this model's tokens"
MPS_DAEMONS = ("private", "existing")
_START: dict[str, Callable[..., Started]] = {
    "sequential": start_local,
    "mp": start_processes,
    "mps": start_processes,
    "green": start_green,
}

Prompt = str | Sequence[int]


def plan_workers(mode: str, workers: str | Sequence[dict[str, Any]], shares: ShareSettings) -> WorkerLayout | None:
    """The workers of ``mode``, laid out as ``workers`` says or by default; None for mode ``generate``.

    Raises :class:`InputError` for a mode that is not there, and for a layout or shares that it cannot have.
    """
    chosen = find_mode(mode)
    if workers and not chosen.laid_out:
        laid_out = [each.name for each in MODES.values() if each.laid_out]
        raise InputError(f"workers are laid out in modes {', '.join(laid_out)}, not in mode {mode}")
    layout = parse_layout(workers) if workers else chosen.layout
    if layout is not None:
        shares.check(chosen, layout)
        if mode == "green":
            check_layout(layout)
    return layout


def check_mps(mode: str, mps: str, exclusive: bool) -> None:
    """Refuse settings of mode ``mps`` that make no sense. Raises :class:`InputError`."""
    if mps not in MPS_DAEMONS:
        raise unknown("mps", mps, MPS_DAEMONS)
    if mps == "existing" and mode != "mps":
        raise InputError(f"mps existing goes with mode mps, not with mode {mode}")
    if exclusive and (mode != "mps" or mps == "existing"):
        raise InputError("exclusive goes with mode mps and a private daemon: it is for a GPU that nobody else uses")


def check_mode_here(mode: str, device: str) -> None:
    """Refuse a mode that this machine cannot run, with the reason and the mode to use instead. Raises
    :class:`InputError`."""
    if problem := find_mode_problem(mode, device):
        raise InputError(f"mode {mode}: {problem}; use mode {'sequential' if mode == 'mp' else 'mp'}")


def check_sizes(kv_memory: str, **counts: int) -> None:
    """Raises :class:`InputError` unless ``kv_memory`` is a size or ``auto`` and each of ``counts`` is 1 or more."""
    for name, given in counts.items():
        if given < 1:
            raise InputError(f"{name} must be 1 or more, not {given}")
    if kv_memory != "auto":
        parse_bytes(kv_memory)


def token_ids(model: LoadedModel, number: int, prompt: Prompt) -> tuple[int, ...]:
    """The tokens of ``prompt``, that of request ``number``. Raises :class:`InputError`."""
    if not isinstance(prompt, str):
        try:
            return tuple(map(operator.index, prompt))
        except TypeError as error:
            raise InputError(f"request {number}: the prompt must be text or token ids, not {prompt!r}") from error
    if model.tokenizer is None:
        raise InputError(f"request {number}: {model.no_text}")
    return tuple(model.tokenizer(check_text(prompt, f"request {number}: the prompt")).input_ids)


class LLM:
    """A model ready to generate.

    Args:
        model: a name of ``configs/models.yaml``, a checkpoint directory (without a tokenizer it serves prompts of token
            ids) or a hub id.
        mode: how the two phases are placed: ``generate``, ``sequential``, ``mp``, ``mps`` or ``green``.
        workers: the layout of modes ``mp``, ``mps`` and ``green``: a list such as
            ``[{"role": "prefill"}, {"role": "decode", "share": 60}]``, a YAML file's path or YAML text; empty for one
            prefill and one decode worker.
        share: how the workers of modes ``mp`` (on a CPU) and ``green`` divide the device: ``fixed`` by their shares,
            ``auto`` by what decode needs to keep ``itl_target_ms`` beside prefill, ``none`` not at all.
        itl_target_ms: what share ``auto`` keeps the time between two tokens under, in milliseconds.
        lend: whether a worker without work lends its part of the device to the others, step by step.
        decode_priority: whether a GPU takes decode's kernels before prefill's where both wait: by the streams' priorities in
            mode ``green``, by the clients' in mode ``mps``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        load_format: ``auto`` reads weights, ``dummy`` draws random ones from the architecture alone.
        kv_memory: the KV pool's size, such as ``512MiB``, or ``auto``.
        max_batch: most requests in one decode step.
        batch_size: rows of a padded batch in mode ``generate``.
        prefill_tokens: most prompt tokens in one prefill step.
        kernels: ``auto`` compiles what is faster so, where there is a compiler; ``plain`` uses PyTorch alone.
        seed: of dummy weights, and of the draws of requests that have no seed of their own.

    Use it as a context manager, or call :meth:`close`. Raises :class:`~splitwiser.errors.InputError` on wrong arguments and
    :class:`~splitwiser.errors.UnsupportedModelError` for a model that the engine cannot serve exactly.
    """

    def __init__(
        self,
        model: str | Path = constants.MODEL,
        *,
        mode: str = constants.MODE,
        workers: str | Sequence[dict[str, Any]] = constants.WORKERS,
        share: str = constants.SHARE,
        itl_target_ms: float = constants.ITL_TARGET_MS,
        lend: bool = constants.LEND,
        decode_priority: bool = constants.DECODE_PRIORITY,
        mps: str = constants.MPS,
        exclusive: bool = constants.EXCLUSIVE,
        dtype: str = constants.DTYPE,
        device: str = constants.DEVICE,
        load_format: str = constants.LOAD_FORMAT,
        kv_memory: str = constants.KV_MEMORY,
        max_batch: int = constants.MAX_BATCH,
        batch_size: int = constants.BATCH_SIZE,
        prefill_tokens: int = constants.PREFILL_TOKENS,
        kernels: str = constants.KERNELS,
        seed: int = constants.SEED,
    ) -> None:
        shares = ShareSettings(share, itl_target_ms, lend, decode_priority)
        layout = plan_workers(mode, workers, shares)
        check_mps(mode, mps, exclusive)
        check_sizes(kv_memory, max_batch=max_batch, batch_size=batch_size, prefill_tokens=prefill_tokens)
        if mode != "mps":  # which looks for itself, and more closely
            check_mode_here(mode, device)
        began = time.perf_counter()
        self.mode = mode
        self.seed = seed
        self._turn = threading.Lock()
        self.workers = str(layout or "1 generate")
        self.mps: dict[str, Any] | None = None
        placed: dict[str, MpsDaemon] = {}
        with ExitStack() as undo:  # of whatever was done, should the rest fail
            if mode == "mps" and layout:
                index = gpu_index(device)
                daemon = undo.enter_context(mps_daemon(mps == "existing", exclusive, index))
                device = f"cuda:{index}"
                placed["daemon"] = daemon
                percentages = {spec.name: thread_percentage(spec, share) for spec in layout.workers}
                self.mps = {"daemon": mps, "exclusive": exclusive, "active_thread_percentages": percentages}
            if MODES[mode].shares_memory:
                warm_up_start()
            self.model: LoadedModel = load_model(
                model,
                dtype=dtype,
                device=device,
                load_format=load_format,
                seed=seed,
                kv_memory="auto" if layout is None else kv_memory,
            )
            if layout is None:
                kernels_used = dict.fromkeys(("prefill_attention", "decode_attention"), "transformers' own")
                one_length = padding_changes_tokens(self.model)
                if one_length:
                    self.model.notes.append(ONE_LENGTH)
                self.started = Started(GenerateEngine(self.model, batch_size, one_length), None, kernels_used, [])
            else:
                settings = EngineSettings(max_batch, prefill_tokens, constants.BLOCK_TOKENS, kv_memory, shares, kernels)
                self.started = _START[mode](self.model, layout, settings, **placed)
            undo.callback(self._engine.close)
            self._warm_up(layout)
            self._undo: Callable[[], None] = undo.pop_all().close
        self._closed = False
        self.ready_s = time.perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up workers, weights, pool and MPS daemon. The device's memory is free for another then, even while a variable
        still names this one."""
        with self._turn:  # another thread's run is not broken off
            if self._closed:
                return
            self._closed = True
            try:
                self._undo()
            finally:
                self.started = replace(self.started, engine=None, pool=None)
                torch.nn.Module.to(self.model.module, "meta")
                release_memory()

    @property
    def _engine(self) -> Engine:
        if self.started.engine is None:
            raise InputError("this LLM is closed; make a new one")
        return self.started.engine

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers that run outside this process, by name."""
        return self._engine.pids

    def make_requests(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        arrival_s: Sequence[float] | None = None,
    ) -> list[Request]:
        """Tokenise ``prompts`` and check that each can be served; arguments as for :meth:`generate`."""
        if isinstance(sampling_params, SamplingParams) or sampling_params is None:
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        arrivals = [0.0] * len(prompts) if arrival_s is None else arrival_s
        for name, given in (("sampling_params", sampling_params), ("arrival_s", arrivals)):
            if len(given) != len(prompts):
                raise InputError(f"{name} has {len(given)} entries for {len(prompts)} prompts; give one each")
        requests = []
        for number, (prompt, params, arrival) in enumerate(zip(prompts, sampling_params, arrivals, strict=True)):
            check_arrival(arrival, f"request {number}")
            if params.stop and self.model.tokenizer is None:
                raise InputError(f"request {number}: stop strings need a tokenizer, and {self.model.name} has none")
            seed = params.seed if params.seed is not None else self.seed * 1_000_003 + number
            request = Request(number, token_ids(self.model, number, prompt), params, seed, arrival)
            check_fits(request, self.model, self._engine.capacity_tokens)
            requests.append(request)
        return requests

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        arrival_s: Sequence[float] | None = None,
        max_concurrency: int | None = None,
        observer: Observer | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt and return the outputs in their order.

        Args:
            prompts: strings or sequences of token ids.
            sampling_params: for all prompts, or one each.
            arrival_s: when each prompt arrives, in seconds from the call; all at once if not given.
            max_concurrency: if given, so many arrive at the call and each further one the moment one finishes.
            observer: is told of steps and finished requests as they come.

        Raises :class:`~splitwiser.errors.InputError` before anything runs if a prompt could never be served.
        """
        if max_concurrency is not None and arrival_s is not None:
            raise InputError("with max_concurrency requests arrive as others finish; leave arrival_s out")
        if max_concurrency is not None and max_concurrency < 1:
            raise InputError(f"max_concurrency must be 1 or more, not {max_concurrency}")
        if isinstance(prompts, str):
            prompts = [prompts]
        requests = self.make_requests(prompts, sampling_params, arrival_s)
        outputs = self.run(requests, observer or Observer(), time.perf_counter_ns(), max_concurrency)
        for output, prompt in zip(outputs, prompts, strict=True):
            output.prompt = prompt if isinstance(prompt, str) else None
        return outputs

    def run(
        self, requests: Sequence[Request], observer: Observer, start_ns: int, max_concurrency: int | None = None
    ) -> list[RequestOutput]:
        """Answer requests made by :meth:`make_requests`; see :meth:`splitwiser.engine.engine.Engine.run`. Threads take
        turns, so another's run is waiting time of the requests."""
        with self._turn:
            return self._engine.run(requests, observer, start_ns, max_concurrency)

    def _warm_up(self, layout: WorkerLayout | None) -> None:
        """Run both phases once on every pair of workers, so that what happens only once stays out of measured runs."""
        count = math.prod(group.count for group in layout.groups) if layout else 1
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        requests = [Request(number, (0, 0), params, seed=0) for number in range(count)]
        self._engine.run(requests, Observer(), time.perf_counter_ns())
