"""Summarises one radiology report with the embedded model, prefill and decode in processes of their own.

python examples/quickstart.py
"""

from splitwiser import LLM, SamplingParams

REPORT = (
    "the lungs are clear. there is no pleural effusion. marked pulmonary edema is seen, less than on the prior study."
)
PROMPT = f"### findings: {REPORT} ### impressions:"


def main() -> None:
    """Print what the model writes and how long it took."""
    with LLM("radiology-opt", mode="mp") as llm:
        output = llm.generate([PROMPT], SamplingParams(max_tokens=64))[0]
    times = output.metrics
    print(f"impression:{output.text}")
    print(f"{len(output.token_ids)} tokens: the first after {times.ttft_ms:.1f} ms, then one in {times.tpot_ms:.1f} ms")


if __name__ == "__main__":
    main()
