"""Measures how the prefill of a long prompt delays a request in decode: its worst ITL against its ITL alone.

    python scripts/interference.py --modes sequential,mp --repeats 3

One request generates tokens throughout; after --after seconds a long prompt arrives. It is prefilled in one step (no
chunks), so only the placement protects the running request. Writes a row per mode and round and prints medians.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from splitwiser import LLM, SamplingParams


def measure(mode: str, options: argparse.Namespace) -> dict[str, object]:
    """Run once; returns the running request's median ITL before the long prompt arrives and its worst ITL during prefill."""
    running = SamplingParams(max_tokens=options.new_tokens, ignore_eos=True)
    with LLM(options.model, mode=mode, load_format="dummy", dtype=options.dtype, prefill_tokens=1 << 20) as llm:
        first, long = llm.generate(
            [[7] * 32, [9] * options.long],
            [running, SamplingParams(max_tokens=1)],
            arrival_s=[0.0, options.after],
        )
    ends = np.array(first.metrics.token_ns[1:])
    gaps = np.array(first.metrics.itl_ms)
    began, ended = long.metrics.prefill_start_ns, long.metrics.token_ns[0]
    alone = float(np.median(gaps[ends < began]))
    during = gaps[(ends > began) & (ends - gaps * 1e6 < ended)]
    return {
        "mode": mode,
        "long prompt's prefill ms": (ended - began) / 1e6,
        "ITL alone ms": alone,
        "worst ITL during ms": float(during.max()),
        "worst over alone": float(during.max()) / alone,
        "tokens made during": int(((ends > began) & (ends < ended)).sum()),
    }


def main() -> None:
    """Measure each mode in turn, round by round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="sequential,mp")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--long", type=int, default=2000, help="tokens of the long prompt")
    parser.add_argument("--new_tokens", type=int, default=300, help="tokens that the running request generates")
    parser.add_argument("--after", type=float, default=1.5, help="seconds until the long prompt arrives")
    parser.add_argument("--out", type=Path, default=Path("results/interference.csv"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for _ in range(options.repeats):
        for mode in options.modes.split(","):
            rows.append(measure(mode, options))
            pd.DataFrame(rows).to_csv(options.out, index=False)
    print(pd.DataFrame(rows).groupby("mode", sort=False).median().round(1).to_string())


if __name__ == "__main__":
    main()
