"""The Python API: a model with an engine around it, in the spelling that vLLM's users know."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from splitwiser import constants
from splitwiser.checks import find_mode_problem
from splitwiser.device import resolve_device
from splitwiser.engine import Engine, EngineSettings, Observer, check_fits
from splitwiser.errors import InputError, unknown
from splitwiser.generate import GenerateEngine
from splitwiser.kv_pool import KVPool
from splitwiser.layout import ONE_MIXED, ONE_OF_EACH, WorkerLayout, parse_layout
from splitwiser.local import start_local
from splitwiser.model import LoadedModel, load_model
from splitwiser.multiprocess import start_processes, warm_up_start
from splitwiser.request import Request, RequestOutput, SamplingParams

Mode = Literal["generate", "sequential", "mp"]
MODES: tuple[Mode, ...] = get_args(Mode)
PLANNED_MODES = {
    "mps": "workers as clients of an NVIDIA MPS daemon",
    "green": "both phases in one process, each in a CUDA green context",
}
DEFAULT_LAYOUTS = {"sequential": ONE_MIXED, "mp": ONE_OF_EACH}

Prompt = str | Sequence[int]


class LLM:
    """A model ready to generate.

    Args:
        model: a name of ``configs/models.yaml``, a checkpoint directory (without a tokenizer it serves prompts of token
            ids) or a hub id.
        mode: how the two phases are placed: ``generate``, ``sequential`` or ``mp``.
        workers: the layout of mode ``mp``: a list such as ``[{"role": "prefill"}, {"role": "decode", "share": 60}]``, a YAML
            file's path or YAML text; empty for one prefill and one decode worker.
        lend_cores: in mode ``mp`` on a CPU, whether a worker without work lends its cores to the others, step by step.
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
        lend_cores: bool = constants.LEND_CORES,
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
        if mode in PLANNED_MODES:
            raise InputError(f"mode {mode} is not there yet ({PLANNED_MODES[mode]}); use one of {', '.join(MODES)}")
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        for name, given in (("max_batch", max_batch), ("batch_size", batch_size), ("prefill_tokens", prefill_tokens)):
            if given < 1:
                raise InputError(f"{name} must be 1 or more, not {given}")
        if workers and mode != "mp":
            raise InputError(f"workers are laid out in mode mp, not in mode {mode}")
        layout = parse_layout(workers) if workers else DEFAULT_LAYOUTS.get(mode)
        if problem := find_mode_problem(mode, resolve_device(device)):
            raise InputError(problem)
        began = time.perf_counter()
        if mode == "mp":
            warm_up_start()
        self.mode = mode
        self.seed = seed
        self.model: LoadedModel = load_model(
            model,
            dtype=dtype,
            device=device,
            load_format=load_format,
            seed=seed,
            kv_memory="auto" if layout is None else kv_memory,
        )
        self.pool: KVPool | None = None
        self.kernels = "transformers' own"
        self.workers = str(layout or "1 generate")
        self._engine: Engine
        if layout is None:
            self._engine = GenerateEngine(self.model, batch_size)
        else:
            start = start_processes if mode == "mp" else start_local
            self._engine, self.pool, self.kernels = start(
                self.model,
                layout,
                EngineSettings(max_batch, prefill_tokens, constants.BLOCK_TOKENS, kv_memory, lend_cores, kernels),
            )
        try:
            self._warm_up(layout)
        except BaseException:
            self.close()
            raise
        self.ready_s = time.perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up workers and memory."""
        self._engine.close()

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
            if not 0 <= arrival < float("inf"):
                raise InputError(f"request {number}: arrival_s must be 0 or more seconds, not {arrival}")
            if params.stop and self.model.tokenizer is None:
                raise InputError(f"request {number}: stop strings need a tokenizer, and {self.model.name} has none")
            seed = params.seed if params.seed is not None else self.seed * 1_000_003 + number
            request = Request(number, self._token_ids(number, prompt), params, seed, arrival)
            check_fits(request, self.model, self._engine.capacity_tokens)
            requests.append(request)
        return requests

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        arrival_s: Sequence[float] | None = None,
        observer: Observer | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt and return the outputs in their order.

        Args:
            prompts: strings or sequences of token ids.
            sampling_params: for all prompts, or one each.
            arrival_s: when each prompt arrives, in seconds from the call; all at once if not given.
            observer: is told of steps and finished requests as they come.

        Raises :class:`~splitwiser.errors.InputError` before anything runs if a prompt could never be served.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        requests = self.make_requests(prompts, sampling_params, arrival_s)
        outputs = self.run(requests, observer or Observer(), time.perf_counter_ns())
        for output, prompt in zip(outputs, prompts, strict=True):
            output.prompt = prompt if isinstance(prompt, str) else None
        return outputs

    def run(self, requests: Sequence[Request], observer: Observer, start_ns: int) -> list[RequestOutput]:
        """Answer requests made by :meth:`make_requests`; see :meth:`splitwiser.engine.Engine.run`."""
        return self._engine.run(requests, observer, start_ns)

    def _token_ids(self, number: int, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.model.tokenizer is None:
            raise InputError(f"request {number}: {self.model.name} has no tokenizer; give its prompt as token ids")
        return tuple(self.model.tokenizer(prompt).input_ids)

    def _warm_up(self, layout: WorkerLayout | None) -> None:
        """Run both phases once on every pair of workers, so that what happens only once stays out of measured runs."""
        count = math.prod(group.count for group in layout.groups) if layout else 1
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        requests = [Request(number, (0, 0), params, seed=0) for number in range(count)]
        self._engine.run(requests, Observer(), time.perf_counter_ns())
