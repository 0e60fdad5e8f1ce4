"""The Python API: a model with an engine, with the names of vLLM's API."""

import math
import operator
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from math import prod
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard

import torch

from splitwiser.engine.engine import Engine, Observer, check_fits
from splitwiser.engine.policy import READ_BY, reads
from splitwiser.engine.progress_bar import ProgressBar
from splitwiser.engine.sampling import sample_seed
from splitwiser.errors import InputError, check_keywords, unknown_name
from splitwiser.machine.device import release_memory
from splitwiser.model.checkpoints.checkpoint import describe_own_sampling
from splitwiser.model.loading import LoadedModel
from splitwiser.options import option_fields
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.prepare import StartedEngine, takes_second_lane
from splitwiser.placement.start import module_of
from splitwiser.request import (
    NO_ADAPTER,
    Adapter,
    PromptInput,
    Request,
    RequestOutput,
    SamplingParams,
    check_messages,
)
from splitwiser.text import check_text, shorten
from splitwiser.workload.arrivals import check_arrival


class LLM:
    """A loaded model with an engine that generates text.

    Args:
        model: a name of the file ``models``, a checkpoint directory (without a tokenizer it serves prompts of token
            ids), a GGUF file or a hub id.
        config: base configuration (default: :class:`EngineConfig`'s defaults); ``model`` and ``options`` override it.
        options: fields of :class:`~splitwiser.placement.config.EngineConfig`:

            - ``models``: YAML file of the models known by name; by default ``configs/models.yaml``.
            - ``mode``: how the two phases are placed: ``generate``, ``sequential``, ``mp``, ``mps`` or ``green``.
            - ``backend``: what computes: ``hf``, this project's own engine over transformers' models, or ``vllm``.
            - ``backend_python``: the Python of the back end's environment; by default the one that
                ``scripts/install_backend.sh`` makes.
            - ``kv_transfer``: from vLLM's prefill engines to its decode engines: ``shared``, one KV pool for all, in which
                nothing is copied, or ``copy``, a pool for each.
            - ``workers``: the layout of modes ``mp``, ``mps`` and ``green``: a list such as
                ``[{"role": "prefill"}, {"role": "decode", "share": 60}]``, a name of ``configs/workers``, a YAML file's
                path or YAML text; empty for one prefill and one decode worker.
            - ``share``: how the workers of modes ``mp`` (on a CPU) and ``green`` divide the device: ``fixed`` by their
                shares, ``auto`` by what decode needs to keep ``itl_target_ms`` beside prefill, ``none`` not at all.
            - ``itl_target_ms``: target for the time between two tokens, in milliseconds, which share ``auto`` keeps (by
                default 50), schedule ``hybrid`` (by default none), or mode ``mp`` on a CPU with a backlog of prompts (60).
            - ``lend``: whether an idle worker lends its share of the device to the others, step by step.
            - ``second_lane``: whether, in mode ``mp`` on a CPU with one prefill worker, fixed shares and lending, a backlog
                of prompts is prefilled in the time between decode steps too.
            - ``decode_priority``: whether a GPU runs decode's kernels before prefill's when both wait: by the priority of
                streams in mode ``green``, of clients in mode ``mps``.
            - ``mps``: in mode ``mps``, ``private`` starts a daemon for this run, ``existing`` uses the one that is running.
            - ``exclusive``: in mode ``mps``, whether to put the GPU into compute mode EXCLUSIVE_PROCESS; needs root.
            - ``dtype``: ``float32`` (or ``fp32``, ``float``), ``bfloat16`` (``bf16``), ``float16`` (``fp16``, ``half``), a
                torch.dtype, or ``auto`` for the checkpoint's type.
            - ``device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            - ``gpu_id``: the same as device ``cuda:N``.
            - ``load_format``: ``auto`` reads weights, ``dummy`` creates random ones, which needs only the architecture.
            - ``kv_memory``: the KV pool's size, such as ``512MiB``, or ``auto``.
            - ``kv_dtype``: what the KV pool stores, on a CPU: ``bfloat16``, ``int8`` (with a scale for each token and head),
              or ``auto`` for ``dtype``.
            - ``policy``: the order of admission and prefill: ``first_come`` (or ``fcfs``), ``shortest_prompt``,
                ``shortest_remaining``, ``priority``, ``deadline``, or ``MODULE:CLASS`` of an importable class with the
                methods of :class:`~splitwiser.engine.policy.Policy`; with parameters, ``"priority:ageing_s=5"``.
            - ``schedule``: what a mixed worker, such as mode ``sequential``'s, runs next: ``alternate``, ``prefill_first``,
                ``decode_first``, ``hybrid`` (a chunk of the prompts and the decode tokens of all running requests in one
                step), or ``MODULE:CLASS`` of an importable class with the method of
                :class:`~splitwiser.engine.schedule.Schedule`.
            - ``reserve``: whether to reserve KV blocks for a request's longest answer at admission. Else it takes blocks
                as it grows; where none is free, the one that the policy puts last is preempted, to be recomputed later.
            - ``prefix_caching``: whether prompts that begin alike share the KV blocks of their beginning, also with those of
                earlier calls.
            - ``max_batch``: maximum number of requests in one decode step.
            - ``batch_size``: rows of a padded batch in mode ``generate``.
            - ``prefill_tokens``: maximum number of prompt tokens in one prefill step; with schedule ``hybrid``, maximum
                number of all tokens in one step, by default as many as saturate the device.
            - ``generation_config``: ``checkpoint`` takes sampling parameters that a request leaves at their default
                from the checkpoint's ``generation_config.json``, as ``model.generate`` would; ``none`` does not.
            - ``quantization``: ``int8`` computes linear layers with whole numbers, on a CPU, and the rest in ``bfloat16``;
              ``none`` does not.
            - ``kernels``: ``auto`` compiles faster kernels if there is a compiler; ``plain`` uses only PyTorch.
            - ``seed``: seed of dummy weights, and of sampling for requests without their own seed.
            - ``adapters``: adapters as peft saves them, by name: ``{"style": "path/to/adapter"}``, or the name of one that
                comes with the model.
            - ``use_adapter``: the adapter of requests that name none; by default the only one if one is given, else
                ``none``, the model alone.
            - ``merge_adapter``: whether to merge the one LoRA adapter into the weights, for all requests.

    Arguments of vLLM's ``LLM`` and of ``from_pretrained`` that are not among these, such as ``tensor_parallel_size``, are
    refused with what is here instead (``EngineConfig.NOT_TAKEN``).

    Use it as a context manager, or call :meth:`close`. Raises :class:`~splitwiser.errors.InputError` for invalid arguments,
    and :class:`~splitwiser.errors.UnsupportedModelError` for a model that the engine cannot serve exactly.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        config: EngineConfig | None = None,
        **options: Any,  # noqa: ANN401  # the fields of EngineConfig, of various types
    ) -> None:
        given = {} if config is None else {name: getattr(config, name) for name in option_fields(EngineConfig)}
        given |= options if model is None else {"model": model, **options}
        # never a subclass, such as a run's: workers receive it, and would import what its own fields need
        self.config = EngineConfig(**given)
        self._lock = threading.Lock()
        began = time.perf_counter()
        with ExitStack() as undo:  # if a later part fails, undoes the earlier ones
            self.started: StartedEngine = module_of(self.config).start(self.config, undo)
            undo.callback(self._engine.close)
            self.model.notes.extend(describe_own_sampling(self.model.own_sampling, self.config.generation_config))
            self.model.notes.extend(self.config.describe_unused(takes_second_lane(self.model)))
            self._warm_up()
            self._undo: Callable[[], None] = undo.pop_all().close
        self._closed = False
        self.ready_s = time.perf_counter() - began

    def __repr__(self) -> str:
        closed = ", closed" if self._closed else ""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"LLM({self.model.name!r}, mode={self.config.mode!r}, workers={self.workers!r}, dtype={dtype!r}, "
            f"device={str(self.model.device)!r}{closed})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release workers, weights, KV pool and MPS daemon. The device's memory is then free for another model, even while
        a variable still refers to this one."""
        with self._lock:  # waits for another thread's run
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
        """The loaded model."""
        return self.started.model

    @property
    def workers(self) -> str:
        """Text description of the worker layout."""
        return str(self.config.layout or "1 generate")

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of workers that run outside this process, by name."""
        return self._engine.pids

    @property
    def _engine(self) -> Engine:
        if self.started.engine is None:
            raise InputError("this LLM is closed; make a new one")
        return self.started.engine

    def make_requests(
        self,
        prompts: Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        arrival_s: Sequence[float] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        *,
        priority: Sequence[int] | None = None,
        ttft_target_ms: Sequence[float | None] | None = None,
        predicted_tokens: Sequence[int | None] | None = None,
    ) -> list[Request]:
        """Tokenise ``prompts`` and return their requests, after taking the memory of the KV pool that they can use at once.
        Arguments and errors are those of :meth:`generate`."""
        if isinstance(sampling_params, SamplingParams) or sampling_params is None:
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if self.config.generation_config == "checkpoint":
            sampling_params = [params.filled(self.model.own_sampling) for params in sampling_params]
        arrivals = [0.0] * len(prompts) if arrival_s is None else arrival_s
        capacity = self._engine.capacity_tokens
        named = [adapter] * len(prompts) if isinstance(adapter, str) or adapter is None else adapter
        adapters = [self._find_adapter(each) for each in named]
        requests = make_requests(
            self.model,
            prompts,
            sampling_params,
            arrivals,
            self.config.seed,
            capacity,
            adapters,
            priority=priority,
            ttft_target_ms=ttft_target_ms,
            predicted_tokens=predicted_tokens,
        )
        for request in requests:
            if problem := self.started.find_request_problem(request):
                raise InputError(f"request {request.request_id}: {problem}")
        self._prefault(requests)
        return requests

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        arrival_s: Sequence[float] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        priority: Sequence[int] | None = None,
        ttft_target_ms: Sequence[float | None] | None = None,
        predicted_tokens: Sequence[int | None] | None = None,
        max_concurrency: int | None = None,
        observer: Observer | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Generate an output for every prompt and return the outputs in the same order. Each of a prompt's samples (``n`` of
        its sampling parameters) is a request of its own; the output is that of the first, with the ``others``.

        Args:
            prompts: strings, or token ids in lists, arrays or tensors, or vLLM's ``{"prompt": text}`` and
                ``{"prompt_token_ids": ids}``, or chats as ``{"messages": [...]}``; one string or mapping alone is one
                prompt.
            sampling_params: one for all prompts, or one for each.
            arrival_s: arrival time of each prompt, in seconds after the call; by default all arrive at once.
            adapter: name of the adapter of all prompts, or of each: ``none`` is the model alone, None the default
                (``use_adapter``).
            priority: a whole number for each prompt: those of the lowest are admitted and prefilled first. Needs policy
                ``priority``, or one of your own that reads it.
            ttft_target_ms: the TTFT that each prompt is to have, in milliseconds after its arrival, or None for the
                policy's own. Needs policy ``deadline``, or one of your own that reads it.
            predicted_tokens: how many new tokens each prompt is predicted to come to, or None for its ``max_tokens``. Needs
                policy ``shortest_remaining``, or one of your own that reads it.
            max_concurrency: if given, this many requests arrive at the call, and each further one when another finishes.
            observer: receives each step and each finished request during the run.
            use_tqdm: whether to show a progress bar.

        Raises :class:`~splitwiser.errors.InputError` before anything runs if a prompt could never be served.
        """
        if max_concurrency is not None and arrival_s is not None:
            raise InputError("with max_concurrency requests arrive as others finish; leave arrival_s out")
        if max_concurrency is not None and max_concurrency < 1:
            raise InputError(f"max_concurrency must be 1 or more, not {max_concurrency}")
        own = {"priority": priority, "ttft_target_ms": ttft_target_ms, "predicted_tokens": predicted_tokens}
        for name, given in own.items():
            if given is not None and not reads(self.config.policy, name):
                raise InputError(
                    f"{name} is for --policy {' or '.join(READ_BY[name])}, and this is {self.config.policy}"
                )
        if isinstance(prompts, (str, Mapping)):
            prompts = [prompts]
        prompts = [
            _write_chat(self.model, f"request {number}", prompt) if _is_chat(prompt) else prompt
            for number, prompt in enumerate(prompts)
        ]
        requests = self.make_requests(
            prompts,
            sampling_params,
            arrival_s,
            adapter,
            priority=priority,
            ttft_target_ms=ttft_target_ms,
            predicted_tokens=predicted_tokens,
        )
        observer = observer or Observer()
        with ProgressBar(observer, requests, self.config.mode) if use_tqdm else nullcontext(observer) as watching:
            outputs = self.run(requests, watching, time.perf_counter_ns(), max_concurrency)
        for output in outputs:
            output.prompt = _text(prompts[output.prompt_id])
        firsts = [output for output in outputs if output.sample == 0]
        for output in outputs:
            if output.sample:
                firsts[output.prompt_id].others.append(output)
        return firsts

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,  # noqa: ANN401  # generate's, of various types
    ) -> list[RequestOutput]:
        """Generate the next message of every chat: :meth:`generate` for prompts that the model's own chat template writes.

        Args:
            messages: one chat, a list of ``{"role": "user", "content": text}``, or a list of such lists.
            sampling_params: one for all chats, or one for each.
            options: those of :meth:`generate`.

        Raises :class:`~splitwiser.errors.InputError`, too, if the model has no chat template or it refuses the messages.
        """
        alone = any(isinstance(each, Mapping) for each in messages)
        return self.generate(
            [{"messages": each} for each in ([messages] if alone else messages)], sampling_params, **options
        )

    def run(
        self, requests: Sequence[Request], observer: Observer, start_ns: int, max_concurrency: int | None = None
    ) -> list[RequestOutput]:
        """Run requests made by :meth:`make_requests`; see :meth:`splitwiser.engine.engine.Engine.run`. Only one thread
        runs at a time; waiting for another's run counts as waiting time of the requests."""
        with self._lock:
            return self._engine.run(requests, observer, start_ns, max_concurrency)

    def cancel(self, request_ids: int | Iterable[int]) -> None:
        """End requests of the call of :meth:`generate`, :meth:`chat` or :meth:`run` that goes on, from another thread or
        from its observer. Each has an output with the tokens that it has come to and the finish reason ``cancelled``, and
        its blocks are free within a step.

        Args:
            request_ids: the ``request_id`` of one request or of several, which in :meth:`generate` are numbered from 0 in
                the order of the prompts, each sample of a prompt after the other. Ids of those that have finished, and
                others, are ignored.
        """
        self._engine.cancel([request_ids] if isinstance(request_ids, int) else request_ids)

    def _find_adapter(self, name: str | None) -> Adapter:
        """Return the adapter called ``name``, or the default. Raises :class:`InputError`."""
        name = self.config.default_adapter if name is None else name
        known = dict(self.model.adapters)
        if not self.config.merge_adapter:
            known[NO_ADAPTER.name] = NO_ADAPTER
        if name not in known:
            raise unknown_name("adapter", name, known)
        return known[name]

    def _prefault(self, requests: Sequence[Request]) -> None:
        """Map the pages of the blocks that ``requests`` can use at once, before the time of any of them counts."""
        pool = self.started.pool
        if pool is None or not requests:
            return
        owners = sum(spec.role != "prefill" for spec in self.config.specs)
        part = pool.blocks // owners
        needs = sorted((pool.blocks_for(request.max_kv_tokens) for request in requests), reverse=True)
        # requests go to the owner with the most free blocks, so that the loads differ by a request at most
        most = min(part, sum(needs[: owners * self.config.max_batch]) // owners + needs[0])
        for first in range(0, owners * part, part):
            pool.prefault(range(first, first + most))  # of a part, the lowest numbers are used first

    def _warm_up(self) -> None:
        """Run both phases once on every pair of workers, so that one-time costs stay out of measured runs."""
        count = prod(Counter(spec.role for spec in self.config.specs).values())
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        encoded = self.model.encodes
        requests = [Request(number, (0, 0), params, seed=0, encoded=encoded) for number in range(count)]
        self._engine.run(requests, Observer(), time.perf_counter_ns())


def make_requests(
    model: LoadedModel,
    prompts: Sequence[PromptInput],
    sampling_params: Sequence[SamplingParams],
    arrival_s: Sequence[float],
    seed: int,
    capacity_tokens: int | None = None,
    adapters: Sequence[Adapter] | None = None,
    *,
    priority: Sequence[int] | None = None,
    ttft_target_ms: Sequence[float | None] | None = None,
    predicted_tokens: Sequence[int | None] | None = None,
) -> list[Request]:
    """Tokenise ``prompts`` for ``model`` and return their requests, with one of ``sampling_params``, ``arrival_s`` and,
    where they are given, of ``adapters``, ``priority``, ``ttft_target_ms`` and ``predicted_tokens`` each.

    There is a request for each sample of a prompt (``n``), one after another. A prompt without its own seed gets one from
    ``seed`` and its number. Raises :class:`InputError` for a request that
    could never be served by the model or, if given, by a KV pool of ``capacity_tokens`` tokens.
    """
    adapters = [NO_ADAPTER] * len(prompts) if adapters is None else adapters
    priorities = [0] * len(prompts) if priority is None else priority
    targets = [None] * len(prompts) if ttft_target_ms is None else ttft_target_ms
    predictions = [None] * len(prompts) if predicted_tokens is None else predicted_tokens
    per_prompt: dict[str, Sequence[Any]] = {
        "sampling_params": sampling_params, "arrival_s": arrival_s, "adapter": adapters, "priority": priorities,
        "ttft_target_ms": targets, "predicted_tokens": predictions,
    }  # fmt: skip
    for name, given in per_prompt.items():
        if len(given) != len(prompts):
            raise InputError(f"{name} has {len(given)} entries for {len(prompts)} prompts; give one each")
    requests: list[Request] = []
    for number, (prompt, params, arrival, adapter, rank, target_ms, predicted) in enumerate(
        zip(prompts, *per_prompt.values(), strict=True)
    ):
        check_arrival(arrival, f"request {number}")
        _check_urgency(rank, target_ms, predicted, f"request {number}")
        if params.stop and model.tokenizer is None:
            raise InputError(f"request {number}: stop strings need a tokenizer, and {model.name} has none")
        own_seed = params.seed if params.seed is not None else seed * 1_000_003 + number
        token_ids = _token_ids(model, f"request {number}", prompt)
        if params.max_tokens is None:
            room = _room(model, f"request {number}", len(token_ids), capacity_tokens, adapter)
            params = replace(params, max_tokens=room)
        request = Request(
            len(requests), token_ids, params, own_seed, arrival, adapter, model.encodes, rank, target_ms, predicted, number
        )  # fmt: skip
        check_fits(request, model, capacity_tokens)
        requests.append(request)
        for sample in range(1, params.n):
            seed_of_sample = sample_seed(own_seed, sample)
            requests.append(replace(request, request_id=len(requests), seed=seed_of_sample, sample=sample))
    return requests


def _check_urgency(priority: object, ttft_target_ms: float | None, predicted_tokens: object, where: str) -> None:
    """Raise :class:`InputError` for a priority that is no whole number, a target that is no time, or a prediction that is no
    number of tokens."""
    if not isinstance(priority, Integral):  # numpy's too
        raise InputError(f"{where}: priority must be a whole number, not {shorten(priority)}")
    if ttft_target_ms is not None and not 0 < ttft_target_ms < math.inf:
        raise InputError(f"{where}: ttft_target_ms must be more than 0 milliseconds, not {ttft_target_ms}")
    if predicted_tokens is not None and (not isinstance(predicted_tokens, Integral) or predicted_tokens < 1):
        raise InputError(
            f"{where}: predicted_tokens must be a whole number of 1 or more, not {shorten(predicted_tokens)}"
        )


def _token_ids(model: LoadedModel, where: str, prompt: PromptInput) -> tuple[int, ...]:
    if _is_chat(prompt):
        prompt = _write_chat(model, where, prompt)
    if isinstance(prompt, _ChatText):
        assert model.tokenizer is not None  # it has written the text
        return tuple(model.tokenizer(str(prompt), add_special_tokens=False).input_ids)
    given = _unwrap(prompt, where) if isinstance(prompt, Mapping) else prompt
    if not isinstance(given, str):
        try:
            ids: Iterable[Any] = given.tolist() if hasattr(given, "tolist") else given  # plain ints, all at once
            return tuple(map(operator.index, ids))
        except TypeError as error:
            hint = "; give a list of prompts, such as [[5, 6, 7]]" if isinstance(given, int) else ""
            raise InputError(f"{where}: the prompt must be text or token ids, not {shorten(given)}{hint}") from error
    if model.tokenizer is None:
        raise InputError(f"{where}: {model.no_text}")
    return tuple(model.tokenizer(check_text(given, f"{where}: the prompt")).input_ids)


def _is_chat(prompt: PromptInput) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(prompt, Mapping) and "messages" in prompt


class _ChatText(str):
    """A chat as its model's template wrote it, with all special tokens that there should be."""

    __slots__ = ()


def _write_chat(model: LoadedModel, where: str, chat: Mapping[str, Any]) -> _ChatText:
    """Return ``chat`` as the text that the model answers. Raises :class:`InputError`."""
    check_keywords(f"key of {where}'s chat", chat, ("messages",))
    return _ChatText(model.write_chat(check_messages(chat["messages"], where), where))


def _text(prompt: PromptInput) -> str | None:
    """Return the text of a prompt that was served; None if it was given as token ids."""
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return str(text) if isinstance(text, str) else None


def _unwrap(prompt: Mapping[str, Any], where: str) -> str | Iterable[int]:
    """Return the token ids of vLLM's form of a prompt or, without, its text. Raises :class:`InputError`."""
    check_keywords(f"key of {where}'s prompt", prompt, ("prompt", "prompt_token_ids", "messages"))
    given: str | Iterable[int] | None = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if given is None:
        raise InputError(f"{where}: the prompt must have 'prompt', 'prompt_token_ids' or 'messages'")
    return given


def _room(model: LoadedModel, where: str, prompt_tokens: int, capacity_tokens: int | None, adapter: Adapter) -> int:
    """Return how many new tokens the model's positions and the KV pool have room for, but at least 1, which is refused later
    if there is none. Raises :class:`InputError` if neither has a limit."""
    before = prompt_tokens - (not model.encodes)  # a decoder's last new token is not stored and has no position
    rooms = [] if capacity_tokens is None else [capacity_tokens - adapter.tail_tokens - before]
    if model.max_positions is not None:
        rooms.append(model.max_positions - (0 if model.encodes else adapter.virtual_tokens + before))
    if not rooms:
        raise InputError(f"{where}: max_tokens None needs a limit, and {model.name} has none; give a number")
    return max(1, min(rooms))
