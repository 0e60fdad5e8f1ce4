"""Runs another engine on a workload file and writes the metrics of ``throughput.csv``, for ``splitwiser compare --peer``.

    ENV/bin/python src/splitwiser/elsewhere.py splitwiser.study.peers.program vllm --model DIR --workload FILE ...

ENV is the peer's own environment, made by scripts/install_peer.sh; from this package it imports only modules that need no
more than numpy. Sampling is greedy, every request generates exactly its number of new tokens, and prefix caching is off.
Loading and a short warm-up come before the measured time and make up ``ready_s`` (without imports, as in a run of
splitwiser). Environment variables that are already set (VLLM_CPU_...) are kept.
"""

import argparse
import json
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from splitwiser.request import RequestMetrics, RequestOutput
from splitwiser.results.goodput import parse_goodput
from splitwiser.results.schema import throughput_figures
from splitwiser.study.peers.engine import Asked, Engine
from splitwiser.study.peers.hf import HfContinuous, HfGenerate
from splitwiser.study.peers.llama_cpp import ARCHITECTURES, LlamaCpp
from splitwiser.study.peers.openvino import OpenVino
from splitwiser.study.peers.pace import Pace, PaceServer
from splitwiser.study.peers.vllm import Vllm

WARM_UP = (4, 8)  # requests and new tokens

ENGINES: dict[str, Callable[[Asked], Engine]] = {
    "vllm": Vllm,
    "vllm-installed": partial(Vllm, installed=True),
    "vllm-zentorch": partial(Vllm, zentorch=True),
    "openvino": OpenVino,
    "openvino-installed": partial(OpenVino, kv="u8", step_tokens=256),
    "openvino-int8": partial(OpenVino, weights="int8", kv="u8"),
    "pace": Pace,
    "pace-installed": PaceServer,
    "llama.cpp": LlamaCpp,
    "llama.cpp-installed": partial(LlamaCpp, step_tokens=512, slots=4, shared=True),
    "hf-generate": HfGenerate,
    "hf-continuous": HfContinuous,
}
"""Each engine in its best setting, and under ``-installed`` as its users get it."""
ONLY = dict.fromkeys(("llama.cpp", "llama.cpp-installed"), ARCHITECTURES)
"""The architectures that engines can be given here, where they cannot be given all."""


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
    engine = ENGINES[options.peer](Asked(options.model, options.dtype, longest, concurrency, options.scratch))
    try:
        first, most = WARM_UP
        serve(engine, prompts[:first], [min(most, each) for each in new_tokens[:first]], concurrency)
        ready_s = time.perf_counter() - engine.began_s
        start_ns = time.perf_counter_ns()
        outputs = serve(engine, prompts, new_tokens, concurrency)
    finally:
        engine.close()
    torch = sys.modules.get("torch")  # which an engine that computes on a GPU has imported
    targets = None if options.goodput is None else parse_goodput(options.goodput)
    return {
        "version": engine.version,
        "device": "cuda:0" if torch is not None and torch.cuda.is_available() else "cpu",
        **throughput_figures(outputs, 0, start_ns, targets),
        "ready_s": ready_s,
        "token_ids": [output.token_ids for output in sorted(outputs, key=lambda output: output.request_id)],
    }


def main(arguments: Sequence[str]) -> None:
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
        "--scratch", type=Path, required=True, help="folder for other forms of the checkpoint, kept between runs"
    )
    parser.add_argument(
        "--max_concurrency", type=int, help="closed loop with this many requests at a time; all at once if not given"
    )
    parser.add_argument("--goodput", help="targets in ms, as for splitwiser run")
    parser.add_argument(
        "--output", type=Path, required=True, help="file for the metrics and token ids, as one JSON object"
    )
    options = parser.parse_args(arguments)
    try:
        figures = measure(options)
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
