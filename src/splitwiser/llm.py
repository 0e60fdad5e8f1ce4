"""The Python API: a model with an engine around it, in the spelling that vLLM's users know."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

from splitwiser import constants
from splitwiser.engine import Engine, Observer, check_fits
from splitwiser.errors import InputError, unknown
from splitwiser.generate import GenerateEngine
from splitwiser.kv_pool import KVPool
from splitwiser.local import start_sequential
from splitwiser.model import LoadedModel, load_model
from splitwiser.request import Request, RequestOutput, SamplingParams

Mode = Literal["generate", "sequential"]
MODES: tuple[Mode, ...] = get_args(Mode)

Prompt = str | Sequence[int]


class LLM:
    """A model ready to generate.

    Args:
        model: a name of ``configs/models.yaml``, a checkpoint directory (without a tokenizer it serves prompts of token
            ids) or a hub id.
        mode: how the two phases are placed: ``generate`` or ``sequential``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        load_format: ``auto`` reads weights, ``dummy`` draws random ones from the architecture alone.
        kv_memory: the KV pool's size, such as ``512MiB``, or ``auto``.
        max_batch: most requests in one decode step; in mode ``generate``, rows of a padded batch.
        prefill_tokens: most prompt tokens in one prefill step.
        seed: of dummy weights, and of the draws of requests that have no seed of their own.

    Use it as a context manager, or call :meth:`close`. Raises :class:`~splitwiser.errors.InputError` on wrong arguments and
    :class:`~splitwiser.errors.UnsupportedModelError` for a model that the engine cannot serve exactly.
    """

    def __init__(
        self,
        model: str | Path = constants.MODEL,
        *,
        mode: str = constants.MODE,
        dtype: str = constants.DTYPE,
        device: str = constants.DEVICE,
        load_format: str = constants.LOAD_FORMAT,
        kv_memory: str = constants.KV_MEMORY,
        max_batch: int = constants.MAX_BATCH,
        prefill_tokens: int = constants.PREFILL_TOKENS,
        seed: int = constants.SEED,
    ) -> None:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        if max_batch < 1:
            raise InputError(f"max_batch must be 1 or more, not {max_batch}")
        if prefill_tokens < 1:
            raise InputError(f"prefill_tokens must be 1 or more, not {prefill_tokens}")
        began = time.perf_counter()
        self.mode = mode
        self.seed = seed
        self.model: LoadedModel = load_model(model, dtype=dtype, device=device, load_format=load_format, seed=seed)
        self.pool: KVPool | None = None
        self.workers: str
        self._engine: Engine
        if mode == "generate":
            self.workers = "1 generate"
            self._engine = GenerateEngine(self.model, max_batch)
        else:
            self.workers = "1 mixed"
            self._engine, self.pool = start_sequential(
                self.model,
                max_batch=max_batch,
                prefill_tokens=prefill_tokens,
                block_tokens=constants.BLOCK_TOKENS,
                kv_memory=kv_memory,
            )
        self._warm_up()
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

    def _warm_up(self) -> None:
        """Run both phases once, so that nothing that happens only once falls into a measured run."""
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        self._engine.run([Request(0, (0, 0), params, seed=0)], Observer(), time.perf_counter_ns())
