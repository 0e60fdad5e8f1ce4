"""Runs another engine on a workload file and writes the metrics of ``throughput.csv``, for ``splitwiser compare --peer``.

    ENV/bin/python src/splitwiser/elsewhere.py splitwiser.study.peer_program vllm --model DIR --workload FILE ...

ENV is the peer's own environment, made by scripts/install_peer.sh; from this package it imports only modules that need no
more than numpy. Sampling is greedy, every request generates exactly its number of new tokens, and prefix caching is off.
Loading and a short warm-up come before the measured time and make up ``ready_s`` (without imports, as in a run of
splitwiser). Environment variables that are already set (VLLM_CPU_...) are kept.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from splitwiser.request import RequestMetrics, RequestOutput
from splitwiser.results.goodput import parse_goodput
from splitwiser.results.schema import throughput_figures

WARM_UP = (4, 8)  # requests and new tokens
PATIENCE_S = 1.0  # between two checks that the engine still runs
KV_GIB = 4
STEP_TOKENS = 2048  # in a step of OpenVINO, as many as in one of vLLM and of splitwiser

Answer = tuple[int, list[int], list[int]]  # request number, token ids, time of each token (perf_counter_ns)


@dataclass(frozen=True)
class Asked:
    """What an engine is to serve: a checkpoint directory in a number format, requests of at most ``longest`` tokens, at most
    ``concurrency`` at a time. ``scratch`` is a folder for what an engine makes of the checkpoint, kept between its runs."""

    model: str
    dtype: str
    longest: int
    concurrency: int
    scratch: Path


class Engine(Protocol):
    """A started peer. ``began_s`` is the start of its loading by ``time.perf_counter``; ``version`` is its version with the
    settings that matter."""

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

    It runs in this process and uses every core. ``installed``, as users get it, it has one process for its scheduler and one
    for its worker and reserves a core for the former, so that only one of two cores computes. With AMD's zentorch in the
    environment vLLM uses it by itself; ``zentorch`` says that it is meant to be there.
    """

    def __init__(self, asked: Asked, *, installed: bool = False, zentorch: bool = False) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if installed else "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_GIB))
        os.environ["HF_HUB_OFFLINE"] = "1"
        from importlib.util import find_spec

        if zentorch != (find_spec("zentorch") is not None):
            raise RuntimeError(f"zentorch is {'not ' if zentorch else ''}installed in this environment")
        from vllm import LLM, SamplingParams, __version__
        from vllm.sampling_params import RequestOutputKind

        self.began_s = time.perf_counter()
        how = "as installed, in processes of its own" if installed else "in one process"
        self.version = f"{__version__} ({how}{', zentorch' if zentorch else ''})"
        self._engine = LLM(
            model=asked.model, dtype=asked.dtype, max_model_len=asked.longest, max_num_seqs=asked.concurrency,
            skip_tokenizer_init=True, enable_prefix_caching=False,
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
        """Do nothing: vLLM ends its processes with this one."""


class OpenVino:
    """OpenVINO GenAI's continuous batching, driven step by step.

    ``kv`` is the number format of K and V, by default the model's, and ``step_tokens`` the most tokens in a step; OpenVINO's
    own choice is u8 and 256. ``weights`` is the format that ``optimum-cli`` exports the checkpoint's weights to.
    """

    def __init__(
        self, asked: Asked, *, weights: str = "fp16", kv: str | None = None, step_tokens: int = STEP_TOKENS
    ) -> None:
        exported = _export_openvino(asked, weights)
        import openvino
        import openvino_genai as genai

        self.began_s = time.perf_counter()
        precision = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[asked.dtype]
        kv = kv or precision
        shown = "int8 weights" if weights == "int8" else precision
        self.version = f"{genai.__version__} ({shown}, K and V {kv}, {step_tokens} tokens a step)"
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = KV_GIB
        scheduler.max_num_seqs = asked.concurrency
        scheduler.max_num_batched_tokens = step_tokens
        scheduler.enable_prefix_caching = False
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": kv,
            "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
        }
        self._pipeline = genai.ContinuousBatchingPipeline(str(exported), scheduler, "CPU", properties)
        self._tensor, self._config = openvino.Tensor, genai.GenerationConfig
        self._answers: dict[int, tuple[Any, int, Answer]] = {}

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        """Add a request."""
        import numpy as np

        config = self._config(max_new_tokens=new_tokens, min_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        handle = self._pipeline.add_request(number, self._tensor(np.array([prompt], dtype=np.int64)), config)
        self._answers[number] = handle, new_tokens, (number, [], [])

    def collect(self) -> Iterator[Answer]:
        """Run a step; yields the answers that it completed."""
        self._pipeline.step()
        now = time.perf_counter_ns()
        for number, (handle, asked_for, answer) in list(self._answers.items()):
            while handle.can_read():
                for output in handle.read().values():
                    answer[1].extend(output.generated_ids)
                    answer[2].extend([now] * len(output.generated_ids))
            if len(answer[1]) >= asked_for:
                del self._answers[number]
                yield answer

    def close(self) -> None:
        """Do nothing: the engine has no other process."""


class HfContinuous:
    """transformers' continuous batching, with PyTorch's own attention over its paged cache."""

    def __init__(self, asked: Asked) -> None:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        self.began_s = time.perf_counter()
        self.version = transformers.__version__
        module = AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype, attn_implementation="sdpa")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._manager = (
            module.eval()
            .to(device)
            .init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
                ContinuousBatchingConfig(allow_block_sharing=False, max_requests_per_batch=asked.concurrency),
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


ENGINES: dict[str, Callable[[Asked], Engine]] = {
    "vllm": Vllm,
    "vllm-installed": partial(Vllm, installed=True),
    "vllm-zentorch": partial(Vllm, zentorch=True),
    "openvino": OpenVino,
    "openvino-installed": partial(OpenVino, kv="u8", step_tokens=256),
    "openvino-int8": partial(OpenVino, weights="int8", kv="u8"),
    "hf-continuous": HfContinuous,
}
"""Each engine in its best setting, and under ``-installed`` as its users get it."""


def _export_openvino(asked: Asked, weights: str) -> Path:
    """Return the folder of the checkpoint in OpenVINO's form, exported once."""
    exported = asked.scratch / f"openvino-{weights}"
    if not exported.exists():
        model = asked.scratch / "openvino-input"
        if not model.exists():
            _with_tokenizer(Path(asked.model), model)
        made = exported.with_suffix(".part")
        subprocess.run(
            [
                Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "--model", model, "--task",
                "text-generation-with-past", "--weight-format", weights, made,
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=True,
        )  # fmt: skip
        made.rename(exported)
    return exported


def _with_tokenizer(model: Path, folder: Path) -> None:
    """Make ``folder`` a copy of the checkpoint ``model`` with a tokenizer of one word a token, which OpenVINO asks for and
    requests of token ids do not use."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix in (".safetensors", ".json") and not path.name.startswith(("tokenizer", "special_tokens")):
            (folder / path.name).symlink_to(path.absolute())
    words = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({f"t{word}": word for word in range(words)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t0").save_pretrained(folder)


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
    import torch

    targets = None if options.goodput is None else parse_goodput(options.goodput)
    return {
        "version": engine.version,
        "device": "cuda:0" if torch.cuda.is_available() else "cpu",
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
