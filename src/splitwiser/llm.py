"""The Python API: a model with an engine around it, in the spelling that vLLM's users know."""

import operator
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from splitwiser.engine.engine import Engine, Observer, check_fits
from splitwiser.errors import InputError
from splitwiser.machine.device import release_memory
from splitwiser.model.loading import LoadedModel
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.modes import find_mode
from splitwiser.placement.prepare import Started
from splitwiser.placement.start import module_of
from splitwiser.request import Prompt, Request, RequestOutput, SamplingParams
from splitwiser.text import check_text
from splitwiser.workload.arrivals import check_arrival


class LLM:
    """A model ready to generate.

    Args:
        model: a name of ``configs/models.yaml``, a checkpoint directory (without a tokenizer it serves prompts of token
            ids) or a hub id.
        config: the configuration that ``model`` and ``options`` change; :class:`EngineConfig`'s defaults if not given.
        options: fields of :class:`~splitwiser.placement.config.EngineConfig`:

            mode: how the two phases are placed: ``generate``, ``sequential``, ``mp``, ``mps`` or ``green``.
            workers: the layout of modes ``mp``, ``mps`` and ``green``: a list such as
                ``[{"role": "prefill"}, {"role": "decode", "share": 60}]``, a YAML file's path or YAML text; empty for one
                prefill and one decode worker.
            share: how the workers of modes ``mp`` (on a CPU) and ``green`` divide the device: ``fixed`` by their shares,
                ``auto`` by what decode needs to keep ``itl_target_ms`` beside prefill, ``none`` not at all.
            itl_target_ms: what share ``auto`` keeps the time between two tokens under, in milliseconds.
            lend: whether a worker without work lends its part of the device to the others, step by step.
            decode_priority: whether a GPU takes decode's kernels before prefill's where both wait: by the streams'
                priorities in mode ``green``, by the clients' in mode ``mps``.
            mps: in mode ``mps``, ``private`` for a daemon of its own, ``existing`` for the one that is there.
            exclusive: in mode ``mps``, whether the GPU is put into compute mode EXCLUSIVE_PROCESS; needs root.
            dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's own.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            gpu_id: the same as device ``cuda:N``.
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
        model: str | Path | None = None,
        config: EngineConfig | None = None,
        **options: Any,  # noqa: ANN401  # the fields of EngineConfig, each of its own type
    ) -> None:
        given = options if model is None else {"model": model, **options}
        self.config = replace(config or EngineConfig(), **given)
        self._turn = threading.Lock()
        began = time.perf_counter()
        with ExitStack() as undo:  # of whatever was done, should the rest fail
            self.started: Started = module_of(find_mode(self.config.mode)).start(self.config, undo)
            undo.callback(self._engine.close)
            self._warm_up()
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
    def model(self) -> LoadedModel:
        """The model that is served."""
        return self.started.model

    @property
    def workers(self) -> str:
        """The layout of the workers in words."""
        return str(self.config.layout or "1 generate")

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers that run outside this process, by name."""
        return self._engine.pids

    @property
    def _engine(self) -> Engine:
        if self.started.engine is None:
            raise InputError("this LLM is closed; make a new one")
        return self.started.engine

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
        capacity = self._engine.capacity_tokens
        return make_requests(self.model, prompts, sampling_params, arrivals, self.config.seed, capacity)

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

    def _warm_up(self) -> None:
        """Run both phases once on every pair of workers, so that what happens only once stays out of measured runs."""
        count = prod(Counter(spec.role for spec in self.config.specs).values())
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        requests = [Request(number, (0, 0), params, seed=0) for number in range(count)]
        self._engine.run(requests, Observer(), time.perf_counter_ns())


def make_requests(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    sampling_params: Sequence[SamplingParams],
    arrival_s: Sequence[float],
    seed: int,
    capacity_tokens: int | None = None,
) -> list[Request]:
    """Tokenise ``prompts`` for ``model``, with parameters and arrival times one each; a request without a seed of its own
    gets one that follows from ``seed`` and its number. Raises :class:`InputError` for one that could never be served, by the
    model or, if given, by a KV pool of ``capacity_tokens`` tokens."""
    for name, given in (("sampling_params", sampling_params), ("arrival_s", arrival_s)):
        if len(given) != len(prompts):
            raise InputError(f"{name} has {len(given)} entries for {len(prompts)} prompts; give one each")
    requests = []
    for number, (prompt, params, arrival) in enumerate(zip(prompts, sampling_params, arrival_s, strict=True)):
        check_arrival(arrival, f"request {number}")
        if params.stop and model.tokenizer is None:
            raise InputError(f"request {number}: stop strings need a tokenizer, and {model.name} has none")
        own_seed = params.seed if params.seed is not None else seed * 1_000_003 + number
        request = Request(number, _token_ids(model, number, prompt), params, own_seed, arrival)
        check_fits(request, model, capacity_tokens)
        requests.append(request)
    return requests


def _token_ids(model: LoadedModel, number: int, prompt: Prompt) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        try:
            return tuple(map(operator.index, prompt))
        except TypeError as error:
            raise InputError(f"request {number}: the prompt must be text or token ids, not {prompt!r}") from error
    if model.tokenizer is None:
        raise InputError(f"request {number}: {model.no_text}")
    return tuple(model.tokenizer(check_text(prompt, f"request {number}: the prompt")).input_ids)
