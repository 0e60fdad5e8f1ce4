"""transformers, by its two ways of generating."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from splitwiser.study.peers.engine import Answer, Asked, describe

BATCH = 20  # rows of a padded batch, as in the original Splitwiser and in mode generate
PATIENCE_S = 1.0  # between two checks that continuous batching still runs


class HfGenerate:
    """``generate`` over batches that are padded on the left, in order of arrival. A batch takes as many steps as its longest
    answer, and what a shorter one gets beyond its own is dropped."""

    def __init__(self, asked: Asked) -> None:
        import torch
        import transformers

        self.began_s = time.perf_counter()
        self._module = _load(asked)
        self.version = describe(
            transformers.__version__, asked.dtype, asked.dtype, f"batches of {BATCH}", torch.get_num_threads()
        )
        self._waiting: list[tuple[int, Sequence[int], int]] = []

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        """Add a request."""
        self._waiting.append((number, prompt, new_tokens))

    def collect(self) -> Iterator[Answer]:
        """Generate a batch; yields its answers."""
        import torch

        batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        width, longest = (max(lengths) for lengths in zip(*((len(row[1]), row[2]) for row in batch), strict=True))
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (_, prompt, _) in enumerate(batch):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self._module.device
        times: list[int] = []

        def note_time(input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            made = input_ids[:, -1].tolist()  # synchronises with the device
            times.append(time.perf_counter_ns())
            return torch.zeros(len(made), dtype=torch.bool, device=device)

        with torch.inference_mode():
            made = self._module.generate(
                input_ids=tokens.to(device), attention_mask=mask.to(device), do_sample=False, max_new_tokens=longest,
                eos_token_id=-1, pad_token_id=0, stopping_criteria=[note_time],
            )  # fmt: skip
        for (number, _, new_tokens), answer in zip(batch, made[:, width:].tolist(), strict=True):
            yield number, answer[:new_tokens], times[:new_tokens]

    def close(self) -> None:
        """Do nothing: the engine has no other thread or process."""


class HfContinuous:
    """``generate_batch``'s continuous batching, with PyTorch's own attention over its paged cache."""

    def __init__(self, asked: Asked) -> None:
        import torch
        import transformers
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.began_s = time.perf_counter()
        self._manager = _load(asked).init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            ContinuousBatchingConfig(allow_block_sharing=False, max_requests_per_batch=asked.concurrency),
        )
        self._manager.warmup()
        self._manager.start()
        steps = f"{self._manager.batch_processor.cache.max_batch_tokens:,} tokens a step"
        self.version = describe(transformers.__version__, asked.dtype, asked.dtype, steps, torch.get_num_threads())

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


def _load(asked: Asked) -> Any:  # noqa: ANN401  # a module of transformers, which not every peer's environment has
    """Return the checkpoint on the GPU, if there is one, with PyTorch's own attention."""
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype, attn_implementation="sdpa")
    return module.eval().to("cuda" if torch.cuda.is_available() else "cpu")
