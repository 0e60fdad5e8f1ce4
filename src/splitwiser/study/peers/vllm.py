"""vLLM."""

import os
import time
from collections.abc import Iterator, Sequence

from splitwiser.study.peers.engine import KV_GIB, Answer, Asked, cores, describe


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
        self._engine = LLM(
            model=asked.model, dtype=asked.dtype, max_model_len=asked.longest, max_num_seqs=asked.concurrency,
            skip_tokenizer_init=True, enable_prefix_caching=False,
        ).llm_engine  # fmt: skip
        settings, made = self._engine.vllm_config, "zentorch" if zentorch else "compiled"
        kv = settings.cache_config.cache_dtype
        self.version = describe(
            __version__, asked.dtype, asked.dtype if kv == "auto" else kv,
            f"{settings.scheduler_config.max_num_batched_tokens:,} tokens a step",
            max(1, cores() - 1) if installed else cores(), made,
            "in processes of its own" if installed else "in this process alone",
        )  # fmt: skip
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
