"""AMD PACE."""

import os
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from splitwiser.study.peers.checkpoint import with_tokenizer
from splitwiser.study.peers.engine import KV_GIB, STEP_TOKENS, Answer, Asked, cores, describe


class Pace:
    """PACE's engine, driven in this process as its own router does over HTTP: a step takes the next token of every running
    request and, up to the tokens of a step, as much as fits of the prompts."""

    def __init__(self, asked: Asked) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "active")  # as PACE's launcher starts an engine
        os.environ["PACE_PREFIX_CACHE"] = "0"
        os.environ["HF_HUB_OFFLINE"] = "1"
        model = asked.scratch / "pace-input"
        if not model.exists():
            with_tokenizer(Path(asked.model), model)
        import pace
        from pace.server.engine import frontend
        from pace.server.engine.utils import MixedStepRequest, ModelConfig, ServerConfig

        self.began_s = time.perf_counter()
        self.version = describe(
            pace.__version__, asked.dtype, asked.dtype, f"{STEP_TOKENS:,} tokens a step", cores(), "SLAB_POOL",
            "in this process alone",
        )  # fmt: skip
        frontend.config_server(
            ServerConfig(
                modelConfig=ModelConfig(modelId=str(model), dataType=asked.dtype, kv_cache_memory_gb=float(KV_GIB))
            )
        )
        self._step, self._request = frontend.step_auto_mixed, MixedStepRequest
        self._waiting: deque[tuple[str, Sequence[int], int]] = deque()  # name, prompt, new tokens
        self._read: dict[str, int] = {}  # tokens of a prompt that were read so far, of one that is longer than a step
        self._running = 0  # requests whose prompt was read
        self._answers: dict[str, Answer] = {}

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        """Add a request."""
        name = str(uuid.uuid4())  # PACE wants one
        self._waiting.append((name, prompt, new_tokens))
        self._answers[name] = number, [], []

    def collect(self) -> Iterator[Answer]:
        """Run a step; yields the answers that it completed."""
        left, chunks, prompts = STEP_TOKENS - self._running, {}, []
        for name, prompt, new_tokens in self._waiting:
            start = self._read.get(name, 0)
            size = min(left, len(prompt) - start)
            if size <= 0:
                break
            left -= size
            chunks[name] = [start, size]
            config = {"max_new_tokens": new_tokens, "ignore_eos": True, "do_sample": False}
            prompts.append({"req_id": name, "prompt": [] if start else list(prompt), "generation_config": config})
        result = self._step(self._request(prefill_batch=prompts, chunk_info_map=chunks))
        now = time.perf_counter_ns()
        for name, made in (result["prefill_result"] | result["decode_result"]).items():
            if "error" in made:
                raise RuntimeError(f"request {self._answers[name][0]}: {made['error']}")
            if made["status"] == "PREFILL_IN_PROGRESS":
                self._read[name] = made["num_computed_tokens"]
                continue
            if name in chunks:
                self._waiting.popleft()  # prompts are read in order
                self._read.pop(name, None)
                self._running += 1
            _, token_ids, token_ns = self._answers[name]
            token_ids += made["token_ids"]
            token_ns += [now] * len(made["token_ids"])
            if made["status"] == "COMPLETED":
                self._running -= 1
                yield self._answers.pop(name)

    def close(self) -> None:
        """Do nothing: the engine has no other process."""
