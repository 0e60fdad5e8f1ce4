"""Several samples of a prompt, and log-probabilities, in every mode."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from splitwiser import LLM, SamplingParams
from splitwiser.engine.sampling import sample_seed
from splitwiser.errors import InputError
from splitwiser.request import RequestOutput
from tests.support.adapters import make_adapter
from tests.support.commands import invoke, only_run, write_workload
from tests.support.tokens import prompts_of, reference_model

MODES = ["sequential", "mp", "generate"]


@cache
def theirs(directory: Path, prompt: tuple[int, ...], new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that ``generate`` makes of ``prompt``, and the log-probabilities of all tokens at each of them."""
    generate: Any = reference_model(directory).generate
    ids = torch.tensor([prompt])
    made = generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return made.sequences[0, -len(made.logits) :], torch.cat(made.logits).log_softmax(-1)


def of_tokens(output: RequestOutput) -> list[float]:
    assert output.logprobs is not None
    return [each[token].logprob for token, each in zip(output.token_ids, output.logprobs, strict=True)]


@pytest.mark.parametrize(
    ("name", "mode"), [*(("llama", mode) for mode in MODES), ("gemma2", "sequential"), ("t5", "mp")]
)
def test_log_probabilities_are_those_of_generate(name: str, mode: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([9, 30, 1, 17])
    # penalties change which token is chosen, and not its log-probability
    params = [SamplingParams(max_tokens=12, logprobs=count) for count in (0, 3, 20)]
    params.append(SamplingParams(max_tokens=12, logprobs=2, logit_bias={7: 100}))
    with LLM(tiny(name), mode=mode, prefill_tokens=100 if name == "t5" else 8) as llm:
        outputs = llm.generate([*prompts, prompts[0]], [*params, SamplingParams(max_tokens=12)])
    for prompt, output, each in zip(prompts[:3], outputs, params, strict=False):
        tokens, logprobs = theirs(tiny(name), tuple(prompt), 12)
        assert output.token_ids == tokens.tolist()
        expected = logprobs.gather(-1, tokens[:, None])[:, 0]
        assert of_tokens(output) == pytest.approx(expected.tolist(), abs=1e-4)
        assert output.outputs[0].cumulative_logprob == pytest.approx(expected.sum().item(), abs=1e-3)
        assert output.logprobs is not None
        for place, choices in enumerate(output.logprobs):
            assert [choice.rank for choice in choices.values()] == list(range(1, max(1, each.logprobs or 0) + 1))
            largest = logprobs[place].topk(len(choices))
            assert list(choices) == largest.indices.tolist()  # greedy: the chosen one is the likeliest
            assert [choice.logprob for choice in choices.values()] == pytest.approx(largest.values.tolist(), abs=1e-4)
    _, biased = theirs(tiny(name), tuple(prompts[3]), 12)
    assert outputs[3].token_ids[0] == 7
    assert of_tokens(outputs[3])[0] == pytest.approx(biased[0, 7].item(), abs=1e-4)
    assert (outputs[4].logprobs, outputs[4].cumulative_logprob, outputs[4].prompt_logprobs) == (None, None, None)


@pytest.mark.parametrize("mode", MODES)
def test_prompts_have_log_probabilities_too(mode: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([20, 1, 33])
    with LLM(tiny("opt"), mode=mode, prefill_tokens=8) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=3, prompt_logprobs=2))
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            expected = reference_model(tiny("opt"))(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert output.prompt_logprobs is not None
        assert output.logprobs is None
        first, *following = output.prompt_logprobs
        assert first is None
        made = [each[token].logprob for token, each in zip(prompt[1:], following, strict=True) if each]
        assert made == pytest.approx([expected[at, token].item() for at, token in enumerate(prompt[1:])], abs=1e-4)
        assert all(each is not None and 2 <= len(each) <= 3 for each in following)


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_those_behind_an_adapter_are_the_same_in_both_engines(adapter: str, tiny: Callable[[str], Path]) -> None:
    values = []
    for mode in ("generate", "sequential"):
        with LLM(tiny("llama"), mode=mode, adapters={adapter: make_adapter(adapter, tiny("llama"))}) as llm:
            (output,) = llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=2, prompt_logprobs=0))
            alone = llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=2, prompt_logprobs=0), adapter="none")[0]
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs != alone.prompt_logprobs
        values.append([choice.logprob for each in output.prompt_logprobs[1:] if each for choice in each.values()])
    assert len(values[0]) == 3
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_a_token_has_its_text(chatty: Path) -> None:
    with LLM(chatty) as llm:
        (output,) = llm.generate("lungs are clear", SamplingParams(max_tokens=3, ignore_eos=True, logprobs=0))
        assert output.logprobs is not None
        texts = [choice.decoded_token for each in output.logprobs for choice in each.values()]
        assert texts == [llm.model.decode([token]) for token in output.token_ids]


def test_an_encoders_prompts_have_none(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("t5")) as llm, pytest.raises(InputError, match="prompt_logprobs are of a decoder's prompts"):
        llm.generate([[5, 6]], SamplingParams(prompt_logprobs=1))


@pytest.mark.parametrize("mode", MODES)
def test_samples_differ_and_the_first_is_that_of_one(mode: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of([9, 20])
    params = [SamplingParams(max_tokens=12, temperature=1.5, seed=5, n=n, ignore_eos=True) for n in (1, 4)]
    with LLM(tiny("gpt2"), mode=mode) as llm:
        alone, several = (llm.generate(prompts, each) for each in params)
        seeds = [sample_seed(5, number) for number in range(4)]
        given = llm.generate(
            [prompts[1]] * 4,
            [SamplingParams(max_tokens=12, temperature=1.5, seed=seed, ignore_eos=True) for seed in seeds],
        )
    assert [output.token_ids for output in several] == [output.token_ids for output in alone]
    assert [[each.index for each in output.outputs] for output in several] == [[0, 1, 2, 3]] * 2
    for output in several:
        assert len({tuple(each.token_ids) for each in output.outputs}) == 4
    assert [each.token_ids for each in several[1].outputs] == [each.token_ids for each in given]


def test_greedy_samples_are_all_the_same(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("gpt2")) as llm:
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, n=3))
    assert [each.token_ids for each in output.outputs] == [output.token_ids] * 3
    assert [each.metrics.token_ns[0] > 0 for each in output.others] == [True] * 2


def test_a_run_has_a_row_for_each_sample(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    prompts = [{"prompt": [5, 6]}, {"prompt": [7, 8, 9], "n": 3, "logprobs": 1, "prompt_logprobs": 0}, {"prompt": [4]}]
    workload = write_workload(tmp_path / "w.json", prompts, 4)
    options = ["--temperature", "1", "--ignore_eos", "--results", str(tmp_path / "out")]
    assert invoke("run", "--model", tiny("opt"), "--workload", workload, *options).returncode == 0
    directory = only_run(tmp_path / "out")
    latency, tokens = (
        pd.read_csv(directory / name).sort_values("request_id") for name in ("latency.csv", "tokens.csv")
    )
    assert latency[["request_id", "prompt_id", "sample"]].values.tolist() == [
        [0, 0, 0], [1, 1, 0], [2, 1, 1], [3, 1, 2], [4, 2, 0]
    ]  # fmt: skip
    assert tokens.logprobs.isna().tolist() == tokens.prompt_logprobs.isna().tolist() == [True, *[False] * 3, True]
    for row in tokens.iloc[1:4].itertuples():
        made = json.loads(str(row.logprobs))
        assert [next(iter(each)) for each in made] == str(row.token_ids).split()
        first, *others = json.loads(str(row.prompt_logprobs))
        assert first is None
        assert [list(each) for each in others] == [["8"], ["9"]]
