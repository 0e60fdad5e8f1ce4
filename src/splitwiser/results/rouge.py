"""Text quality: ROUGE scores of the generated texts against the references."""

import importlib.util
import re
import tempfile
from collections.abc import Sequence

from tqdm import tqdm

from splitwiser.machine.process import environment, has_home
from splitwiser.results.schema import ROUGE


def can_score() -> bool:
    """Return whether the library that :func:`rouge` needs is installed."""
    return importlib.util.find_spec("rouge_score") is not None


# Scripts that put no space between words: each of their letters counts as a word.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+")


class Words:
    """A tokenizer that finds lower-cased words of every script. For ASCII text it matches rouge-score's own tokenizer,
    which supports no other letters."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of ``text``."""
        return _WORD.findall(text.lower())


def rouge(references: Sequence[str], texts: Sequence[str]) -> dict[str, float | None]:
    """Return the mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) of ``texts`` against ``references``, computed
    by rouge-score without stemming over the words of :class:`Words`; shows a progress bar if it takes over a second.
    References without words are left out; the scores are None if no reference has words."""
    # nltk, which rouge-score imports, refuses to be imported by a user without a home folder
    with environment(**({} if has_home() else {"HOME": tempfile.gettempdir()})):
        from rouge_score import rouge_scorer  # only runs with references need it
    words = Words()
    scorer = rouge_scorer.RougeScorer(list(ROUGE), tokenizer=words)
    pairs = tqdm(zip(references, texts, strict=True), "ROUGE", len(references), leave=False, delay=1)
    scores = [scorer.score(reference, text) for reference, text in pairs if words.tokenize(reference)]
    if not scores:
        return dict.fromkeys(ROUGE)
    return {name: sum(float(score[name].fmeasure) for score in scores) / len(scores) for name in ROUGE}
