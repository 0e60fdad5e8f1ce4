"""A metric of one's own: the longest pause that a reader sees in the middle of an answer.

    python examples/custom_metric.py

docs/extending/metric.md adds it to the program's own table, so that every CSV, table and page has it.
"""

import time

from splitwiser import LLM, SamplingParams
from splitwiser.results.metrics import Served, itl
from splitwiser.results.schema import Metric


def longest_pause(run: Served) -> float | None:
    """Return the longest time between two tokens of a request, in milliseconds; None if no answer has two."""
    return max(run.pool(itl), default=None)


METRIC = Metric("longest_pause_ms", "Longest time between two tokens of a request.", "ms", compute=longest_pause)


def main() -> None:
    """Print the metric of each mode."""
    prompts = [[7] * 200] * 40
    for mode in ("sequential", "mp"):
        with LLM("radiology-opt", mode=mode) as llm:
            start_ns = time.perf_counter_ns()
            outputs = llm.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True), max_concurrency=10)
        print(f"{mode:10}  {METRIC.title}: {longest_pause(Served(outputs, 0, start_ns)):.1f} {METRIC.unit}")


if __name__ == "__main__":
    main()
