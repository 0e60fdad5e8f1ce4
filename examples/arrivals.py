"""Serves the same requests, which arrive over time, without and with a split, and compares what their readers wait for.

python examples/arrivals.py --rate 40
"""

import argparse

import numpy as np

from splitwiser import LLM, SamplingParams

PROMPT = (
    "### findings: the heart is enlarged. a small left pleural effusion is new since the prior exam. ### impressions:"
)


def main() -> None:
    """Print the latencies of each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=40, help="requests per second, on average")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--modes", default="sequential,mp")
    options = parser.parse_args()
    gaps = np.random.default_rng(0).exponential(1 / options.rate, options.requests)
    arrival_s = gaps.cumsum().tolist()  # a Poisson process
    for mode in options.modes.split(","):
        with LLM("radiology-opt", mode=mode) as llm:
            outputs = llm.generate(
                [PROMPT] * options.requests, SamplingParams(max_tokens=32, ignore_eos=True), arrival_s=arrival_s
            )
        ttft = [output.metrics.ttft_ms for output in outputs]
        itl = [gap for output in outputs for gap in output.metrics.itl_ms]
        print(
            f"{mode:10}  TTFT p50 {np.median(ttft):.1f} ms, p99 {np.percentile(ttft, 99):.1f} ms"
            f"   ITL p50 {np.median(itl):.1f} ms, p99 {np.percentile(itl, 99):.1f} ms"
        )


if __name__ == "__main__":
    main()
