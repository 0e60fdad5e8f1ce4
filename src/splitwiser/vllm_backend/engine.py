"""One engine of vLLM, in this process, behind what a worker needs of it. Runs in vLLM's environment."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import register_model_loader
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from splitwiser.engine.messages import StepPhase, TokenLogprobs
from splitwiser.request import FinishReason, Request
from splitwiser.vllm_backend import connector
from splitwiser.vllm_backend.connector import Exchange
from splitwiser.vllm_backend.loader import SharedLoader
from splitwiser.vllm_backend.messages import BlockHandoff, EngineSetup

LOAD_FORMAT = "splitwiser"


@dataclass(frozen=True)
class Made:
    """What a step made of one request: its new token, whether that is its first, and why it has finished (None: it has not).

    ``start_ns`` is the start of the first step that computed it, and ``cached_tokens`` is the number of tokens of its prompt
    that were not computed, since earlier requests began with the same. If it asks for them, ``logprobs`` are those of its
    token, and ``prompt_logprobs``, beside the first token, those of its prompt's from the second on. ``lease`` is what the
    connector says of a prompt whose blocks it has leased to ``decode_worker``, and None for all else."""

    request: Request
    token: int
    is_first: bool
    reason: FinishReason | None
    start_ns: int
    cached_tokens: int
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs, ...]
    lease: Mapping[str, Any] | None
    decode_worker: str


@dataclass(frozen=True)
class Step:
    """A finished step, which may compute prompts and tokens. ``tokens`` is the number of tokens whose K and V it computed.
    ``decode_tokens`` of them are of requests in decode, which had a token and have lost none of their blocks."""

    start_ns: int
    end_ns: int
    requests: int
    tokens: int
    decode_tokens: int
    made: Sequence[Made]

    @property
    def phase(self) -> StepPhase:
        """What it computed."""
        if 0 < self.decode_tokens < self.tokens:
            return "hybrid"
        return "decode" if self.decode_tokens else "prefill"


@dataclass
class _Open:
    request: Request
    has_token: bool = False
    decode_worker: str = ""
    start_ns: int = 0


class Engine:
    """vLLM's engine for the role of ``setup``. With an ``exchange``, its KV cache is the shared pool."""

    def __init__(self, setup: EngineSetup, exchange: Exchange | None) -> None:
        options = setup.options
        self._eos = options.eos_token_ids
        self._added = 0
        self._open: dict[str, _Open] = {}
        self._scheduled: dict[str, int] = {}  # tokens of each request in the latest step, by vLLM's id
        more: dict[str, Any] = {}
        if setup.weights is not None:
            register_model_loader(LOAD_FORMAT)(SharedLoader)
            more |= {"load_format": LOAD_FORMAT, "model_loader_extra_config": {"fd": setup.weights.fd}}
        if exchange is not None:
            connector.use(exchange)
            more["kv_transfer_config"] = KVTransferConfig(
                kv_connector="SharedPoolConnector",
                kv_connector_module_path=connector.__name__,
                kv_role="kv_producer" if setup.role == "prefill" else "kv_consumer",
            )
        arguments = EngineArgs(
            model=options.model,
            dtype=options.dtype,
            seed=options.seed,
            max_model_len=options.longest,
            max_num_seqs=options.max_batch,
            max_num_batched_tokens=max(options.prefill_tokens, options.max_batch),
            kv_cache_memory_bytes=options.kv_bytes,
            enforce_eager=options.eager,
            # decode's blocks change their numbers, by which vLLM's cache would go on to find them
            enable_prefix_caching=options.prefix_caching and setup.role != "decode",
            async_scheduling=False,  # a step's tokens are known when it ends
            skip_tokenizer_init=exchange is not None or not options.has_tokenizer,  # stop strings alone need it
            generation_config="vllm",
            disable_log_stats=True,
            **more,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._watch_schedule()
        cache = self._engine.vllm_config.cache_config
        self.block_tokens: int = cache.block_size
        self.blocks = self.free_blocks
        self.longest: int = min(self._engine.model_config.max_model_len, self.blocks * self.block_tokens)

    @property
    def free_blocks(self) -> int:
        """Number of blocks that are this engine's and free."""
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def has_work(self) -> bool:
        """Whether there are requests that have not finished. Without them, a step only frees blocks whose leases ended."""
        return bool(self._engine.has_unfinished_requests())

    def settings(self) -> dict[str, Any]:
        """Return vLLM's version and resolved settings, for the run's record."""
        config = self._engine.vllm_config
        return {
            "vllm": vllm.__version__,
            "torch": str(torch.__version__),
            "platform": type(current_platform).__name__,  # ZenCpuPlatform where AMD's zentorch is installed
            "threads": torch.get_num_threads(),
            "cores": sorted(os.sched_getaffinity(0)),
            "load_format": str(config.load_config.load_format),
            "compilation": str(config.compilation_config.mode),
            "block_tokens": self.block_tokens,
            "blocks": self.blocks,
            "kv_cache_memory_bytes": config.cache_config.kv_cache_memory_bytes,
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "async_scheduling": config.scheduler_config.async_scheduling,
        }

    def add(self, request: Request) -> None:
        """Add a request that this engine serves alone."""
        self._add(_Open(request), request.prompt_token_ids, self._sampling(request, request.max_tokens))

    def add_prompt(self, request: Request, decode_worker: str) -> None:
        """Add a request of which this engine makes the first token, and whose blocks it then leases to ``decode_worker``."""
        lend = request.max_tokens > 1
        params = self._sampling(request, 1, {"decode_worker": decode_worker} if lend else None)
        self._add(_Open(request, decode_worker=decode_worker), request.prompt_token_ids, params)

    def add_handoff(self, message: BlockHandoff) -> None:
        """Add a request that prefill has made the first token of."""
        request, first = message.request, message.handoff
        offer = {
            "lease": message.lease,
            "blocks": message.blocks,
            "kept": message.kept,
            "prefill_worker": first.prefill_worker,
        }
        prompt = (*request.prompt_token_ids, first.first_token)
        params = self._sampling(request, request.max_tokens - 1, offer, made=1)
        self._add(_Open(request, has_token=True), prompt, params)

    def cancel(self, request_id: int) -> bool:
        """End a request, whose blocks are then free or go back to prefill. Returns False if it is not in this engine."""
        name = next((name for name, each in self._open.items() if each.request.request_id == request_id), None)
        if name is None:
            return False
        del self._open[name]
        self._engine.abort_request([name])
        return True

    def step(self) -> Step | None:
        """Run one step; None if it computed nothing."""
        start_ns = time.perf_counter_ns()
        outputs = self._engine.step()
        end_ns = time.perf_counter_ns()
        tokens, self._scheduled = self._scheduled, {}
        decode_tokens = 0
        for name, count in tokens.items():
            opened = self._open[_own_id(name)]
            opened.start_ns = opened.start_ns or start_ns
            decode_tokens += count == 1 and opened.has_token
        made = [self._made(output) for output in outputs]
        if not tokens:
            return None
        return Step(start_ns, end_ns, len(tokens), sum(tokens.values()), decode_tokens, made)

    def _made(self, output: Any) -> Made:
        opened = self._open[output.request_id]
        completion = output.outputs[0]
        reason: FinishReason | None = completion.finish_reason
        if output.finished:
            del self._open[output.request_id]
            if reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended request {opened.request.request_id} with '{reason}'")
        (token,) = completion.token_ids
        is_first, opened.has_token = not opened.has_token, True
        return Made(
            opened.request,
            token,
            is_first,
            reason,
            opened.start_ns,
            output.num_cached_tokens,
            _token_logprobs(completion.logprobs[0]) if completion.logprobs else None,
            tuple(map(_token_logprobs, (output.prompt_logprobs or [])[1:])),  # the first token has none
            output.kv_transfer_params,
            opened.decode_worker,
        )

    def _add(self, opened: _Open, prompt: Sequence[int], params: SamplingParams) -> None:
        self._added += 1
        name = str(self._added)  # of this engine alone: request ids begin anew with every run
        self._open[name] = opened
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)

    def _sampling(
        self, request: Request, new_tokens: int, transfer: Mapping[str, Any] | None = None, made: int = 0
    ) -> SamplingParams:
        """Return vLLM's parameters for ``new_tokens`` tokens of ``request``, of which ``made`` have been made elsewhere."""
        params = request.params
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos)}
        return SamplingParams(
            max_tokens=new_tokens,
            min_tokens=min(new_tokens, max(0, params.min_tokens - made)),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=None if params.logit_bias is None else dict(params.logit_bias),
            # numbers that another engine has drawn already are not drawn again
            seed=None if params.temperature == 0 else request.seed + made,
            stop=list(params.stop),
            stop_token_ids=sorted(stops),
            ignore_eos=True,  # the end-of-sequence tokens are among the others
            logprobs=params.logprobs,
            prompt_logprobs=None if made else params.prompt_logprobs,
            detokenize=bool(params.stop),
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if transfer is None else {"kv_transfer_params": dict(transfer)},
        )

    def _watch_schedule(self) -> None:
        """Note what vLLM's scheduler puts into each step."""
        schedule = self._scheduler.schedule

        def watched(*arguments: Any, **named: Any) -> Any:
            scheduled = schedule(*arguments, **named)
            self._scheduled = dict(scheduled.num_scheduled_tokens)
            return scheduled

        self._scheduler.schedule = watched


def _token_logprobs(choices: Mapping[int, Any]) -> TokenLogprobs:
    return tuple((token, each.logprob, each.rank) for token, each in choices.items())


def _own_id(name: str) -> str:
    """Return the id that a request was added with: vLLM appends random characters to it."""
    return name.rpartition("-")[0]
