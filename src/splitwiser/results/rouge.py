"""Text quality beside speed: ROUGE of what was generated against the references."""

import importlib.util
import re
import tempfile
from collections.abc import Sequence

from tqdm import tqdm

from splitwiser.machine.process import environment, has_home
from splitwiser.results.schema import ROUGE


def can_score() -> bool:
    """Whether the library that :func:`rouge` needs is installed."""
    return importlib.util.find_spec("rouge_score") is not None


# Scripts that put no space between words: each of their letters counts as a word.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+")


class Words:
    """Words of every script, lower-cased. Of ASCII text they are what rouge-score's own tokenizer finds, which knows no
    other letters."""

    def tokenize(self, text: str) -> list[str]:
        """The words of ``text``."""
        return _WORD.findall(text.lower())


def rouge(references: Sequence[str], texts: Sequence[str]) -> dict[str, float | None]:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) of ``texts`` against ``references``, as rouge-score
    counts them, without stemming, over :class:`Words`; shows a progress bar if it takes more than a moment. References
    without a word are left out; None if none has one."""
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
