"""A scheduling policy of one's own, with a parameter: short prompts first, as long as they are about equally short.

python examples/custom_policy.py
PYTHONPATH=examples splitwiser compare --modes sequential --variant 'classes: --policy custom_policy:LengthClasses:width=100'
"""

from dataclasses import dataclass

import numpy as np

from splitwiser import LLM, SamplingParams
from splitwiser.engine.policy import WaitingRequest
from splitwiser.engine.ranked import Ranked


@dataclass(frozen=True)
class LengthClasses(Ranked):
    """Admits and prefills requests by the class of their prompt's length, each ``width`` tokens wide, and within a class in
    order of arrival."""

    width: int = 100

    def rank(self, waiting: WaitingRequest) -> float:
        """See :meth:`splitwiser.engine.ranked.Ranked.rank`."""
        return waiting.left // self.width


def main() -> None:
    """Print the TTFT of short and long prompts under each policy."""
    lengths = np.random.default_rng(0).choice([20, 400], 60, p=[0.8, 0.2])
    prompts = [[7] * length for length in lengths]
    for policy in ("first_come", "custom_policy:LengthClasses:width=200"):
        with LLM("radiology-opt", policy=policy, prefill_tokens=512) as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
        ttft = np.array([output.metrics.ttft_ms for output in outputs])
        short, long = (np.median(ttft[lengths == length]) for length in (20, 400))
        print(f"{policy:38}  median TTFT: short prompts {short:.1f} ms, long ones {long:.1f} ms")


if __name__ == "__main__":
    main()
