"""A scheduling policy of one's own: the shortest prompt first, which lowers the median TTFT and lets long prompts wait.

python examples/custom_policy.py
PYTHONPATH=examples splitwiser compare --modes sequential --variant 'shortest: --policy custom_policy:ShortestFirst'
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from splitwiser import LLM, SamplingParams
from splitwiser.engine.policy import FirstCome, PendingPrompt
from splitwiser.request import Request


class ShortestFirst(FirstCome):
    """Admits and prefills requests in order of the length of their prompts."""

    def admission_order(self, waiting: Collection[Request]) -> Iterable[Request]:
        """See :meth:`splitwiser.engine.policy.Policy.admission_order`."""
        return sorted(waiting, key=lambda request: len(request.prompt_token_ids))

    def pack(self, prompts: Sequence[PendingPrompt], budget: int) -> list[tuple[PendingPrompt, int]]:
        """See :meth:`splitwiser.engine.policy.Policy.pack`."""
        return super().pack(sorted(prompts, key=lambda prompt: prompt.left), budget)


def main() -> None:
    """Print the TTFT of short and long prompts under each policy."""
    lengths = np.random.default_rng(0).choice([20, 400], 60, p=[0.8, 0.2])
    prompts = [[7] * length for length in lengths]
    for policy in ("first_come", "custom_policy:ShortestFirst"):
        with LLM("radiology-opt", policy=policy, prefill_tokens=512) as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
        ttft = np.array([output.metrics.ttft_ms for output in outputs])
        short, long = (np.median(ttft[lengths == length]) for length in (20, 400))
        print(f"{policy:28}  median TTFT: short prompts {short:.1f} ms, long ones {long:.1f} ms")


if __name__ == "__main__":
    main()
