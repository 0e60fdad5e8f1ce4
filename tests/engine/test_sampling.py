"""When a request ends, and tokens chosen from logits, against a second implementation in numpy and the probabilities."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from splitwiser.engine import sampling
from splitwiser.engine.penalties import TokenCounts
from splitwiser.engine.sampling import final_text, finish_reason, sample_seed, uniform
from splitwiser.request import SamplingParams

LOGITS = (1.5, -0.5, 3.0, 0.0, 2.25, -2.0, 0.75, 1.0)
DRAWS = 10_000
EOS = (1, 2)


@dataclass(frozen=True)
class Due:
    params: SamplingParams
    seed: int = 0
    drawn: int = 0

    def token_counts(self, _: int | None) -> Tensor:
        return TokenCounts((), 1).after(())


def sample_tokens(logits: Tensor, requests: Sequence[Due]) -> Tensor:
    return sampling.sample_tokens(logits, requests, EOS, None)


@cache
def counts_of(params: SamplingParams, draws: int, logits: tuple[float, ...] = LOGITS) -> Counter[int]:
    """How often each token is drawn from ``logits``, with ``draws`` seeds."""
    batch = torch.tensor(logits).expand(draws, -1)
    return Counter(sample_tokens(batch, [Due(params, seed) for seed in range(draws)]).tolist())


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def probabilities_of(logits: Sequence[float], params: SamplingParams) -> np.ndarray[Any, Any]:
    """The written-out distribution: softmax of the scaled logits, cut to top_k, top_p, then min_p; not normalised again.

    All tokens as likely as the k-th stay; of equally likely ones the smaller ids make up top_p first.
    """
    scaled = np.asarray(logits, dtype=np.float64) / params.temperature
    if params.top_k:
        least = sorted(scaled, reverse=True)[min(params.top_k, len(scaled)) - 1]
        scaled = np.where(scaled < least, -np.inf, scaled)
    weights = np.exp(scaled - scaled.max())
    probabilities: np.ndarray[Any, Any] = weights / weights.sum()
    before = 0.0
    for token in sorted(range(len(scaled)), key=lambda each: (-probabilities[each], each)):
        likely = probabilities[token]
        if before >= params.top_p:
            probabilities[token] = 0
        before += likely
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    return probabilities


def token_at(probabilities: np.ndarray[Any, Any], share: float) -> int:
    """The token in which ``share`` of the whole probability, in vocabulary order, lies."""
    aim, total = share * probabilities.sum(), 0.0
    for token, likely in enumerate(probabilities):
        total += likely
        if total > aim:
            return token
    raise AssertionError("no token reaches the aim")


# uniform


@pytest.mark.parametrize(
    ("seed", "first_output"), [(1, 0xE220A8397B1DCDAF), (2, 0x6E789E6AA1B965F4), (3, 0x06C45D188009454F)]
)
def test_mixes_as_published(seed: int, first_output: int) -> None:
    # with position -1, the state is seed x the golden constant: the published outputs of splitmix64 started at 0
    assert uniform(seed, -1) == (first_output >> 11) / 2**53


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63, 2**64 - 1, 2**64, -(2**70), 10**30])
def test_any_seed_gives_a_number_from_0_to_1(seed: int) -> None:
    assert all(0 <= uniform(seed, position) < 1 for position in range(200))


def test_same_seed_and_position_give_the_same_number() -> None:
    assert [uniform(5, position) for position in range(9)] == [uniform(5, position) for position in range(9)]


def test_no_two_seeds_and_positions_share_a_number() -> None:
    numbers = [uniform(seed, position) for seed in range(200) for position in range(200)]
    assert len(set(numbers)) == len(numbers)


SEQUENCES = {
    "positions of a seed": [uniform(0, position) for position in range(20_000)],
    "seeds of a position": [uniform(seed, 0) for seed in range(20_000)],
    "seeds and positions together": [uniform(number, number) for number in range(20_000)],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_numbers_fill_every_tenth_alike(name: str) -> None:
    counts = Counter(int(number * 10) for number in SEQUENCES[name])
    assert sum((counts[tenth] - 2000) ** 2 / 2000 for tenth in range(10)) < 33.7  # 1 in 10,000 at 9 degrees of freedom


@pytest.mark.parametrize("name", SEQUENCES)
def test_neighbours_say_nothing_of_each_other(name: str) -> None:
    pairs = np.array(list(pairwise(SEQUENCES[name])))
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.03


# greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_largest_logit(dtype: torch.dtype) -> None:
    logits = random_logits(20, 50).to(dtype)
    largest = [max(range(50), key=row.__getitem__) for row in logits.tolist()]
    assert sample_tokens(logits, [Due(SamplingParams(temperature=0))] * 20).tolist() == largest


@pytest.mark.parametrize("top_k", [0, 2])
def test_greedy_does_not_depend_on_seed_or_cuts(top_k: int) -> None:
    params = SamplingParams(temperature=0, top_k=top_k, top_p=0.1)
    assert set(counts_of(params, 50)) == {2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_int64_one_a_request(temperature: float) -> None:
    tokens = sample_tokens(random_logits(3, 9), [Due(SamplingParams(temperature=temperature))] * 3)
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (3,))


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(4, 9)
    before = logits.clone()
    sample_tokens(logits, [Due(SamplingParams(temperature=0.5, top_k=2, top_p=0.4))] * 4)
    assert torch.equal(logits, before)


# drawn


MIXED = [
    Due(SamplingParams(temperature=0.0)),
    Due(SamplingParams(temperature=1.0), 1),
    Due(SamplingParams(temperature=0.7, top_k=3), 2),
    Due(SamplingParams(temperature=0.0, top_k=5), 3),
    Due(SamplingParams(temperature=1.3, top_p=0.6), 4, 7),
    Due(SamplingParams(temperature=2.0, top_k=20, top_p=0.9), 5, 2),
    Due(SamplingParams(temperature=1.0, top_k=1000), 6, 1),
]


@pytest.mark.parametrize("seed", range(5))
def test_a_request_draws_alone_what_it_draws_in_a_batch(seed: int) -> None:
    logits = random_logits(len(MIXED), 40, seed)
    alone = [sample_tokens(logits[row : row + 1], [request]).item() for row, request in enumerate(MIXED)]
    assert sample_tokens(logits, MIXED).tolist() == alone


def test_the_order_of_a_batch_does_not_matter() -> None:
    logits = random_logits(len(MIXED), 40)
    order = random.Random(1).sample(range(len(MIXED)), len(MIXED))
    shuffled = sample_tokens(logits[order], [MIXED[row] for row in order]).tolist()
    tokens = sample_tokens(logits, MIXED).tolist()
    assert shuffled == [tokens[row] for row in order]


def test_greedy_requests_beside_drawn_ones_stay_greedy() -> None:
    logits = random_logits(len(MIXED), 40)
    tokens, largest = sample_tokens(logits, MIXED), logits.argmax(dim=-1)
    greedy = [row for row, request in enumerate(MIXED) if not request.params.temperature]
    assert tokens[greedy].tolist() == largest[greedy].tolist()


@pytest.mark.parametrize("field", ["seed", "drawn"])
def test_draws_differ_by(field: str) -> None:
    params = SamplingParams(temperature=5.0)
    requests = [Due(params, **{field: number}) for number in range(100)]
    assert len(set(sample_tokens(torch.tensor(LOGITS).expand(100, -1), requests).tolist())) == len(LOGITS)


CUTS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.5, "top_k": 8},
    {"temperature": 1.5, "top_k": 9},
    {"temperature": 1.5, "top_k": 10**9},
    {"temperature": 1.5, "top_p": 0.001},
    {"temperature": 1.5, "top_p": 0.5},
    {"temperature": 1.5, "top_p": 0.99},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.7},
    {"temperature": 2.0, "top_k": 2, "top_p": 0.99},
    {"temperature": 1.5, "min_p": 0.2},
    {"temperature": 1.5, "min_p": 1.0},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.9, "min_p": 0.25},
]
cuts = pytest.mark.parametrize("settings", CUTS, ids=lambda each: " ".join(f"{key}={each[key]:g}" for key in each))


@cuts
def test_frequencies_are_the_probabilities(settings: dict[str, Any]) -> None:
    params = SamplingParams(**settings)
    probabilities = probabilities_of(LOGITS, params)
    expected = dict(enumerate(DRAWS * probabilities / probabilities.sum()))
    counts = counts_of(params, DRAWS)
    distance = sum((counts[token] - times) ** 2 / times for token, times in expected.items() if times > 5)
    assert distance < 29.9  # 1 in 10,000 at 7 degrees of freedom


@cuts
def test_no_token_is_drawn_that_the_cuts_leave_out(settings: dict[str, Any]) -> None:
    params = SamplingParams(**settings)
    kept = {token for token, likely in enumerate(probabilities_of(LOGITS, params)) if likely}
    assert set(counts_of(params, DRAWS)) <= kept


@cuts
def test_every_token_is_drawn_that_the_cuts_keep(settings: dict[str, Any]) -> None:
    params = SamplingParams(**settings)
    likely_kept = {token for token, likely in enumerate(probabilities_of(LOGITS, params)) if likely > 2e-3}
    assert set(counts_of(params, DRAWS)) >= likely_kept


@cuts
def test_the_probabilities_are_those_of_transformers(settings: dict[str, Any]) -> None:
    params, logits = SamplingParams(**settings), random_logits(100, 30, seed=6)
    kinds = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    scores = logits
    for name, value in settings.items():  # in the order in which generate applies them
        scores = kinds[name](value)(torch.zeros(100, 0), scores)
    for theirs, row in zip(scores.softmax(dim=-1), logits.tolist(), strict=True):
        probabilities = probabilities_of(row, params)
        np.testing.assert_allclose(probabilities / probabilities.sum(), theirs, atol=1e-5)


@cuts
def test_each_draw_is_the_written_out_one(settings: dict[str, Any]) -> None:
    params = SamplingParams(**settings)
    logits = random_logits(100, 30, seed=5)
    requests = [Due(params, seed=row * 17, drawn=row % 5) for row in range(100)]
    expected = [
        token_at(probabilities_of(row, params), uniform(request.seed, request.drawn))
        for row, request in zip(logits.tolist(), requests, strict=True)
    ]
    assert sample_tokens(logits, requests).tolist() == expected


@pytest.mark.parametrize(
    ("logits", "settings", "kept"),
    [
        pytest.param([1, 3, 3, 0, 3], {"top_k": 2}, {1, 2, 4}, id="all as likely as the k-th stay"),
        pytest.param([1, 3, 3, 0, 3], {"top_k": 3}, {1, 2, 4}, id="k takes all ties"),
        pytest.param([5, 5, 5, 5], {"top_p": 0.5}, {0, 1}, id="of ties the first make up top_p"),
        pytest.param([5, 5, 5, 5], {"top_p": 0.51}, {0, 1, 2}, id="the one that passes top_p stays"),
        pytest.param([0, 9, 0], {"top_p": 0.01}, {1}, id="the likeliest always stays"),
        pytest.param([1, 2, 3, 4], {"top_k": 2, "top_p": 0.999}, {2, 3}, id="top_p counts what top_k left"),
        pytest.param([1, float("-inf"), 1], {}, {0, 2}, id="impossible tokens are never drawn"),
        pytest.param([1, float("-inf"), 1], {"top_k": 3}, {0, 2}, id="nor by a larger k"),
    ],
)
def test_kept_tokens(logits: list[float], settings: dict[str, Any], kept: set[int]) -> None:
    assert set(counts_of(SamplingParams(temperature=1.0, **settings), 2_000, tuple(logits))) == kept


def test_of_a_vocabulary_of_ties_the_first_half_makes_up_half() -> None:
    drawn = counts_of(SamplingParams(temperature=1.0, top_p=0.5), 500, (1.0,) * 4096)
    assert 2000 < max(drawn) < 2048


@pytest.mark.parametrize(("share", "token"), [(0.0, 1), (1 - 2**-53, 3)])
@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.9}])
def test_the_least_and_the_largest_number_draw_a_kept_token(
    settings: dict[str, Any], share: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda *_: share)
    request = Due(SamplingParams(temperature=1.0, **settings))
    assert sample_tokens(torch.tensor([[-9.0, 1.3, 0.4, 1.1, -9.0]]), [request]).item() == token


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-60])
def test_a_temperature_near_0_is_near_greedy(temperature: float) -> None:
    assert set(counts_of(SamplingParams(temperature=temperature), 200)) == {2}


def test_a_huge_temperature_is_near_uniform() -> None:
    counts = counts_of(SamplingParams(temperature=1e9), 16_000)
    assert sum((counts[token] - 2000) ** 2 / 2000 for token in range(8)) < 29.9


def test_logits_are_changed_only_where_a_request_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(len(MIXED) + 1, 40)
    changes: list[int] = []

    def change(logits: Tensor, requests: Sequence[Due], *_: object) -> Tensor:
        changes.append(len(requests))
        return logits

    monkeypatch.setattr(sampling, "change_logits", change)
    sample_tokens(logits[1:], MIXED)
    assert changes == []
    sample_tokens(logits, [*MIXED, Due(SamplingParams(min_tokens=1))])
    assert changes == [len(MIXED) + 1]


def test_changed_logits_are_those_that_tokens_are_chosen_by() -> None:
    logits = torch.tensor([LOGITS, LOGITS])
    greedy = SamplingParams(logit_bias={5: 50})
    drawn = SamplingParams(temperature=1.0, logit_bias={7: 50})
    assert sample_tokens(logits, [Due(greedy), Due(drawn)]).tolist() == [5, 7]


def test_half_precision_logits_draw_as_their_float32_values() -> None:
    logits = random_logits(len(MIXED), 40).to(torch.bfloat16)
    assert sample_tokens(logits, MIXED).tolist() == sample_tokens(logits.float(), MIXED).tolist()


# -- when a request ends, and what text it leaves


def decode(token_ids: Sequence[int]) -> str:
    """Tokens from 97 on are letters."""
    return "".join(chr(token) for token in token_ids)


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def no_text(_: Sequence[int]) -> str:
    raise AssertionError("nothing asked for the text")


@pytest.mark.parametrize(
    ("settings", "token_ids", "reason"),
    [
        pytest.param({}, ids("abc"), None, id="goes on"),
        pytest.param({"max_tokens": 4}, ids("abc"), None, id="one more to come"),
        pytest.param({"max_tokens": 3}, ids("abc"), "length", id="at max_tokens"),
        pytest.param({"max_tokens": 1}, ids("a"), "length", id="at one token"),
        pytest.param({}, [*ids("ab"), 1], "stop", id="end of sequence"),
        pytest.param({}, [*ids("ab"), 2], "stop", id="another end of sequence"),
        pytest.param({}, [1], "stop", id="end of sequence as the first token"),
        pytest.param({"max_tokens": 3}, [*ids("ab"), 2], "stop", id="end of sequence goes before length"),
        pytest.param({"ignore_eos": True}, [*ids("ab"), 2], None, id="ignored end of sequence"),
        pytest.param({"ignore_eos": True, "max_tokens": 3}, [*ids("ab"), 2], "length", id="ignored, and at max_tokens"),
        pytest.param({}, [*ids("a"), 2, *ids("b")], None, id="only the last token ends"),
        pytest.param({"stop": ("c",)}, ids("abc"), "stop", id="stop string"),
        pytest.param({"stop": ("bc",)}, ids("abc"), "stop", id="stop string over two tokens"),
        pytest.param({"stop": ("x", "bc")}, ids("abc"), "stop", id="one of two stop strings"),
        pytest.param({"stop": ("cd",)}, ids("abc"), None, id="half a stop string"),
        pytest.param({"stop": ("c",), "max_tokens": 3}, ids("abc"), "stop", id="stop string goes before length"),
        pytest.param({"stop_token_ids": ids("xc")}, ids("abc"), "stop", id="one of two stop tokens"),
        pytest.param({"stop_token_ids": ids("b")}, ids("abc"), None, id="only the last token may be a stop token"),
        pytest.param({"stop_token_ids": ids("c"), "ignore_eos": True}, ids("abc"), "stop", id="stop token of its own"),
        pytest.param({"stop": ("b",), "min_tokens": 2}, ids("abc"), None, id="stop string in the first min_tokens"),
        pytest.param({"stop": ("bc",), "min_tokens": 2}, ids("abc"), "stop", id="stop string that ends after them"),
        pytest.param({"stop": ("b",), "min_tokens": 2}, ids("abcb"), "stop", id="stop string again after them"),
        pytest.param(
            {"stop": ("c",), "ignore_eos": True}, ids("abc"), "stop", id="stop string without end of sequence"
        ),
    ],
)
def test_reason(settings: dict[str, Any], token_ids: list[int], reason: str | None) -> None:
    assert finish_reason(SamplingParams(**settings), token_ids, EOS, decode) == reason


def test_text_is_made_only_for_stop_strings() -> None:
    assert finish_reason(SamplingParams(), ids("abc"), EOS, no_text) is None


def test_a_model_without_an_end_of_sequence_goes_on() -> None:
    assert finish_reason(SamplingParams(), [1, 2], (), no_text) is None


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), "abcabc"),
        (("x",), "abcabc"),
        (("c",), "ab"),
        (("bc", "c"), "a"),
        (("c", "bc"), "a"),
        (("abc",), ""),
        (("ca", "x"), "ab"),
    ],
)
def test_text_is_cut_before_the_first_stop_string(stop: tuple[str, ...], text: str) -> None:
    assert final_text(SamplingParams(stop=stop), ids("abcabc"), decode) == text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"stop_token_ids": ids("c")}, "abcab"),
        ({"stop_token_ids": ids("b")}, "abcabc"),
        ({"stop": ("c",), "min_tokens": 3}, "abcab"),
        ({"stop": ("bca",), "min_tokens": 3}, "a"),
    ],
)
def test_text_ends_where_the_request_did(settings: dict[str, Any], text: str) -> None:
    assert final_text(SamplingParams(**settings), ids("abcabc"), decode) == text


def test_samples_of_a_seed_have_seeds_of_their_own() -> None:
    seeds = {sample_seed(seed, sample) for seed in range(100) for sample in range(50)}
    assert len(seeds) == 5000
    assert all(sample_seed(seed, 0) == seed for seed in range(100))
