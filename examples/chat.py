"""Asks a model made for chats two questions at once, then goes on with the first chat, with each phase in a process.

scripts/get_smollm2.sh        # once; or --model DIR, FILE.gguf or a hub id of another model
python examples/chat.py
"""

import argparse

from splitwiser import LLM, SamplingParams

QUESTIONS = ["What is the capital of France?", "Which gas do plants take in from the air?"]
FOLLOW_UP = "What is it famous for? Answer in one sentence."


def main() -> None:
    """Print each question with its answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--mode", default="mp")
    options = parser.parse_args()
    params = SamplingParams(max_tokens=64)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with LLM(options.model, mode=options.mode) as llm:
        answers = llm.chat(chats, params)
        longer = [
            *chats[0],
            {"role": "assistant", "content": answers[0].text},
            {"role": "user", "content": FOLLOW_UP},
        ]
        answers += llm.chat(longer, params)
    for question, answer in zip([*QUESTIONS, FOLLOW_UP], answers, strict=True):
        print(f"> {question}\n{answer.text.strip()}")
    tokens = sum(len(answer.token_ids) for answer in answers)
    print(f"{tokens} tokens, the first of each within {max(answer.metrics.ttft_ms for answer in answers):.0f} ms")


if __name__ == "__main__":
    main()
