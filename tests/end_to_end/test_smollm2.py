"""SmolLM2-135M-Instruct, real weights: the tokens of transformers' ``generate``, and answers that are right."""

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from splitwiser import LLM, SamplingParams, constants
from tests.support.tokens import references

FOLDER = Path(os.environ.get("SPLITWISER_SMOLLM2", constants.DIR_PROJECT / "models" / "smollm2-135m-instruct"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "config.json").is_file(),
        reason="needs SmolLM2: scripts/get_smollm2.sh makes it, and SPLITWISER_SMOLLM2 says where it is",
    ),
]

ANSWERS = {
    "What is the capital of France?": "Paris",
    "How many days are in a week?": "7",
    "What is the chemical symbol of water?": "H2O",
    "What is the opposite of hot?": "cold",
    "Name the largest ocean on Earth.": "Pacific",
    "In which city is the Eiffel Tower?": "Paris",
}
TEXTS = [
    "The lungs are clear.", "Once upon a time", "def fibonacci(n):\n    ", "1, 2, 3, 4,", "a  12   b 3456.78",
    "größe 日本 🙂", "Dear Sir or Madam,", "SELECT name FROM", "The three largest cities of Germany are", "x", "\n\n",
    "Q: 17 + 25 =\nA:", "It was the best of times, it was the worst of times. " * 12, "To be, or not to be",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["sequential", "mp"])
def test_twenty_prompts_have_the_tokens_of_transformers(mode: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    chats = [[{"role": "user", "content": question}] for question in ANSWERS]
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    written = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    prompts += [tokenizer(str(text), add_special_tokens=False).input_ids for text in written]
    with LLM(FOLDER, mode=mode, prefill_tokens=100) as llm:  # splits the longest
        outputs = llm.generate([*TEXTS, *({"messages": chat} for chat in chats)], SamplingParams(max_tokens=8))
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert [output.token_ids for output in outputs] == references(FOLDER, prompts, 8)


def test_questions_are_answered_with_the_right_word() -> None:
    with LLM(FOLDER, mode="mp") as llm:
        outputs = llm.chat([[{"role": "user", "content": each}] for each in ANSWERS], SamplingParams(max_tokens=24))
    for output, word in zip(outputs, ANSWERS.values(), strict=True):
        assert word in output.text


def test_an_answer_ends_at_a_stop_string() -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    with LLM(FOLDER) as llm:
        (output,) = llm.chat(chat, SamplingParams(max_tokens=24, stop=" of"))
    assert (output.text, output.finish_reason) == ("The capital", "stop")
