"""Text quality beside speed: ROUGE of what was generated against the references."""

import importlib.util
from collections.abc import Sequence

from tqdm import tqdm

ROUGE = ("rouge1", "rouge2", "rougeL")


def can_score() -> bool:
    """Whether the library that :func:`rouge` needs is installed."""
    return importlib.util.find_spec("rouge_score") is not None


def rouge(references: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) of ``texts`` against ``references``, as rouge-score
    counts them, without stemming; shows a progress bar if it takes more than a moment."""
    from rouge_score import rouge_scorer  # only runs with references need it

    scorer = rouge_scorer.RougeScorer(list(ROUGE))
    pairs = tqdm(zip(references, texts, strict=True), "ROUGE", len(references), leave=False, delay=1)
    scores = [scorer.score(reference, text) for reference, text in pairs]
    return {name: sum(float(score[name].fmeasure) for score in scores) / len(scores) for name in ROUGE}
