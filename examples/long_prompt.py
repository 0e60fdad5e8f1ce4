"""Measures how the prefill of a long prompt delays a request that is generating: its longest ITL against its ITL alone.

    python examples/long_prompt.py --modes sequential,mp --repeats 3

One request generates throughout; after --after seconds a long prompt arrives. It is prefilled in one step (no chunks), so
only the placement protects the running request. Writes a row per mode and round and prints medians.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from splitwiser import LLM, SamplingParams


def measure(mode: str, options: argparse.Namespace) -> dict[str, object]:
    """Run once and return a row: the running request's ITL before the long prompt arrives and during its prefill."""
    running = SamplingParams(max_tokens=options.new_tokens, ignore_eos=True)
    with LLM(options.model, mode=mode, load_format="dummy", dtype=options.dtype, prefill_tokens=1 << 20) as llm:
        prompts = [[7] * 32, [9] * options.long]
        params = [running, SamplingParams(max_tokens=1)]
        first, long = llm.generate(prompts, params, arrival_s=[0.0, options.after])
    ends, gaps = np.array(first.metrics.token_ns[1:]), np.array(first.metrics.itl_ms)
    began, ended = long.metrics.prefill_start_ns, long.metrics.token_ns[0]
    during = gaps[(ends > began) & (ends - gaps * 1e6 < ended)]
    if not during.size:
        raise SystemExit(
            "the running request ended before the long prompt arrived: raise --new_tokens or lower --after"
        )
    alone, worst = np.median(gaps[ends < began]), during.max()
    return {
        "mode": mode,
        "long prompt's prefill ms": (ended - began) / 1e6,
        "ITL alone ms": alone,
        "worst ITL during ms": worst,
        "worst over alone": worst / alone,
        "tokens made during": int(((ends > began) & (ends < ended)).sum()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="sequential,mp")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--long", type=int, default=2000, help="tokens of the long prompt")
    parser.add_argument("--new_tokens", type=int, default=300, help="tokens that the running request generates")
    parser.add_argument("--after", type=float, default=1.5, help="seconds until the long prompt arrives")
    parser.add_argument("--out", type=Path, default=Path("results/long_prompt.csv"))
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.modes.split(",") * given.repeats:
        rows.append(measure(name, given))
        pd.DataFrame(rows).to_csv(given.out, index=False)
    print(pd.DataFrame(rows).groupby("mode", sort=False).median().round(1).to_string())
