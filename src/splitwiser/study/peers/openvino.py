"""OpenVINO GenAI."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from splitwiser.study.peers.checkpoint import with_tokenizer
from splitwiser.study.peers.engine import KV_GIB, STEP_TOKENS, Answer, Asked, cores, describe


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
        kv, threads = kv or precision, cores()
        self.version = describe(
            genai.__version__, "int8 weights" if weights == "int8" else precision, kv, f"{step_tokens:,} tokens a step",
            threads,
        )  # fmt: skip
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = KV_GIB
        scheduler.max_num_seqs = asked.concurrency
        scheduler.max_num_batched_tokens = step_tokens
        scheduler.enable_prefix_caching = False
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": kv,
            "INFERENCE_NUM_THREADS": threads,
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


def _export_openvino(asked: Asked, weights: str) -> Path:
    """Return the folder of the checkpoint in OpenVINO's form, exported once."""
    exported = asked.scratch / f"openvino-{weights}"
    if not exported.exists():
        model = asked.scratch / "openvino-input"
        if not model.exists():
            with_tokenizer(Path(asked.model), model)
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
