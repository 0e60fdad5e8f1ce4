"""Runs another engine on a workload file and writes the metrics of ``throughput.csv``, for ``splitwiser compare --peer``.

    PYTHONPATH=src ENV/bin/python -m splitwiser.study.peer_program vllm --model DIR --workload FILE --output FILE.json

ENV is the peer's own environment, made by scripts/install_peer.sh; from this package it imports only modules that need no
more than numpy. Sampling is greedy, every request generates exactly its number of new tokens, and prefix caching is off.
Loading and a short warm-up come before the measured time and make up ``ready_s`` (without imports, as in a run of
splitwiser). Environment variables that are already set (VLLM_CPU_...) are kept.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from splitwiser.request import RequestMetrics, RequestOutput
from splitwiser.results.goodput import parse_goodput
from splitwiser.results.schema import throughput_figures

WARM_UP = (4, 8)  # requests and new tokens
PATIENCE_S = 1.0  # between two checks that the engine still runs

Answer = tuple[int, list[int], list[int]]  # request number, token ids, time of each token (perf_counter_ns)


class Engine(Protocol):
    """A started peer. ``began_s`` is the start of its loading by ``time.perf_counter``; ``version`` is its version."""

    began_s: float
    version: str

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        """Add a request."""

    def collect(self) -> Iterator[Answer]:
        """Wait for a step or a short time; yields the completed answers."""

    def close(self) -> None:
        """End the engine's threads and processes."""


class Vllm:
    """vLLM's engine, compiled, driven step by step.

    It runs in this process and uses every core. By default, vLLM has one process for the engine and one for its worker and
    reserves a core for the former, so that only one of two cores computes; with both cores, the two processes compete.
    """

    def __init__(self, model: str, dtype: str, longest: int, concurrency: int) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
        os.environ["HF_HUB_OFFLINE"] = "1"
        from vllm import LLM, SamplingParams, __version__
        from vllm.sampling_params import RequestOutputKind

        self.began_s = time.perf_counter()
        self.version = __version__
        self._engine = LLM(
            model=model, dtype=dtype, max_model_len=longest, max_num_seqs=concurrency, skip_tokenizer_init=True,
            enable_prefix_caching=False,
        ).llm_engine  # fmt: skip
        self._params = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self._answers: dict[int, Answer] = {}

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        """Add a request."""
        self._answers[number] = (number, [], [])
        params = self._params.clone()
        params.max_tokens = new_tokens
        self._engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params)

    def collect(self) -> Iterator[Answer]:
        """Run a step; yields the answers that it completed."""
        outputs = self._engine.step()
        now = time.perf_counter_ns()
        for output in outputs:
            number, token_ids, token_ns = self._answers[int(output.request_id)]
            new = output.outputs[0].token_ids
            token_ids += new
            token_ns += [now] * len(new)
            if output.finished:
                yield self._answers.pop(number)

    def close(self) -> None:
        """Do nothing: the engine has no other process."""


class HfContinuous:
    """transformers' continuous batching, with PyTorch's own attention over its paged cache."""

    def __init__(self, model: str, dtype: str, longest: int, concurrency: int) -> None:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        self.began_s = time.perf_counter()
        self.version = transformers.__version__
        module = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._manager = (
            module.eval()
            .to(device)
            .init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
                ContinuousBatchingConfig(allow_block_sharing=False, max_requests_per_batch=concurrency),
            )
        )
        self._manager.warmup()
        self._manager.start()

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        """Add a request."""
        self._manager.add_request(
            list(prompt), request_id=str(number), max_new_tokens=new_tokens, record_timestamps=True
        )

    def collect(self) -> Iterator[Answer]:
        """Yield the next answer; raises RuntimeError if the engine has stopped."""
        result = self._manager.get_result(timeout=PATIENCE_S)
        if result is None:
            if not self._manager.is_running():
                raise RuntimeError("the engine stopped before all requests were answered")
            return
        if result.error is not None:
            raise RuntimeError(f"request {result.request_id}: {result.error}")
        token_ns = [round(moment * 1e9) for moment in result.timestamps]  # its clock is perf_counter
        yield int(result.request_id), list(result.generated_tokens), token_ns

    def close(self) -> None:
        """End the engine's thread."""
        self._manager.stop(block=True)


ENGINES: dict[str, Callable[[str, str, int, int], Engine]] = {"vllm": Vllm, "hf-continuous": HfContinuous}


def serve(
    engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], concurrency: int
) -> list[RequestOutput]:
    """Answer all prompts: ``concurrency`` requests arrive at the start, and each further one when another finishes.

    Raises RuntimeError if a request was given another number of tokens than asked for.
    """
    waiting = deque(range(len(prompts)))
    arrival_ns: dict[int, int] = {}
    outputs: list[RequestOutput] = []
    while len(outputs) < len(prompts):
        now = time.perf_counter_ns()
        while waiting and len(arrival_ns) - len(outputs) < concurrency:
            number = waiting.popleft()
            arrival_ns[number] = now
            engine.add(number, prompts[number], new_tokens[number])
        for number, token_ids, token_ns in engine.collect():
            if not len(token_ids) == len(token_ns) == new_tokens[number]:
                raise RuntimeError(f"request {number} has {len(token_ids)} tokens instead of {new_tokens[number]}")
            metrics = RequestMetrics(arrival_ns[number], token_ns=token_ns)
            outputs.append(
                RequestOutput(number, tuple(prompts[number]), token_ids, "", "length", metrics, prompt_id=number)
            )
    return outputs


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start the peer, run the workload and return its metrics, named as in ``throughput.csv``, and ``token_ids``, the
    answer of each request."""
    work = json.loads(options.workload.read_text(encoding="utf-8"))
    prompts, new_tokens = work["prompts"], work["max_new_tokens"]
    concurrency = options.max_concurrency or len(prompts)
    longest = max(len(prompt) + new for prompt, new in zip(prompts, new_tokens, strict=True))
    engine = ENGINES[options.peer](options.model, options.dtype, longest, concurrency)
    try:
        first, most = WARM_UP
        serve(engine, prompts[:first], [min(most, each) for each in new_tokens[:first]], concurrency)
        ready_s = time.perf_counter() - engine.began_s
        start_ns = time.perf_counter_ns()
        outputs = serve(engine, prompts, new_tokens, concurrency)
    finally:
        engine.close()
    import torch

    targets = None if options.goodput is None else parse_goodput(options.goodput)
    return {
        "version": engine.version,
        "device": "cuda:0" if torch.cuda.is_available() else "cpu",
        **throughput_figures(outputs, 0, start_ns, targets),
        "ready_s": ready_s,
        "token_ids": [output.token_ids for output in sorted(outputs, key=lambda output: output.request_id)],
    }


def main() -> None:
    """Run a peer; on failure the last line on stderr says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=ENGINES)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument(
        "--workload",
        type=Path,
        required=True,
        help="a workload file as compare writes it: token ids and a number of new tokens for each prompt",
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--max_concurrency", type=int, help="closed loop with this many requests at a time; all at once if not given"
    )
    parser.add_argument("--goodput", help="targets in ms, as for splitwiser run")
    parser.add_argument(
        "--output", type=Path, required=True, help="file for the metrics and token ids, as one JSON object"
    )
    options = parser.parse_args()
    try:
        figures = measure(options)
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
