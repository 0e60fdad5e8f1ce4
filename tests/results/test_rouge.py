"""ROUGE against hand-worked examples."""

import pytest

from splitwiser.results.rouge import Words, can_score, rouge

REFERENCE = "the cat sat on the mat"


def f_measure(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall)


def test_a_worked_example() -> None:
    # all 3 words are in the reference's 6; 1 of 2 pairs in its 5; "the cat" is the longest common subsequence
    scores = rouge([REFERENCE], ["mat the cat"])
    assert scores == pytest.approx(
        {"rouge1": f_measure(3 / 3, 3 / 6), "rouge2": f_measure(1 / 2, 1 / 5), "rougeL": f_measure(2 / 3, 2 / 6)}
    )


def test_figures_are_means_over_the_texts() -> None:
    scores = rouge([REFERENCE, "no acute findings", "normal"], ["mat the cat", "No acute findings.", "broken rib"])
    assert scores["rouge1"] == pytest.approx((f_measure(1, 0.5) + 1 + 0) / 3)
    assert scores["rougeL"] == pytest.approx((f_measure(2 / 3, 2 / 6) + 1 + 0) / 3)


def test_a_text_is_scored_against_its_own_reference() -> None:
    assert rouge(["a b", "c d"], ["c d", "a b"])["rouge1"] == 0


def test_words_are_not_stemmed() -> None:
    assert rouge(["effusions"], ["effusion"])["rouge1"] == 0


@pytest.mark.parametrize("text", ["心脏大小正常", "сердце в норме", "größe 3 mm", "ไม่มี", "normal"])
def test_the_same_text_scores_fully_in_every_script(text: str) -> None:
    assert rouge([text], [text])["rouge1"] == pytest.approx(1)


def test_letters_of_a_script_without_spaces_count_as_words() -> None:
    assert rouge(["心脏正常"], ["心脏"])["rouge1"] == pytest.approx(f_measure(2 / 2, 2 / 4))


def test_words_of_ascii_are_those_of_rouge_scores_own_tokenizer() -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    text = "No acute_disease; 3.5-mm nodule (RUL), T2/T3 it's"
    assert Words().tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_references_without_a_word_give_no_figure() -> None:
    assert rouge(["...", "-"], ["...", "a"]) == {"rouge1": None, "rouge2": None, "rougeL": None}


def test_references_without_a_word_are_left_out() -> None:
    assert rouge(["...", "a"], ["b", "a"])["rouge1"] == pytest.approx(1)


def test_an_empty_text_scores_nothing() -> None:
    assert rouge(["a b"], [""]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_a_machine_without_the_library_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    assert can_score()
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert not can_score()
