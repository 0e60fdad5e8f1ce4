"""Cases: the numbered prompting recipes of ``configs/cases.yaml`` and how each turns reports into prompts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, get_args

from splitwiser.errors import InputError, unknown_name
from splitwiser.files import read_entries
from splitwiser.formats import AtLeastOne, AtLeastZero, Text, Whole, must_be, parse_as
from splitwiser.workload.reports import Report

Method = Literal["discrete", "prefix_tuning", "lora"]  # the others run with an adapter of that kind


@dataclass(frozen=True)
class Case:
    """One recipe. A prompt is ``start_prefix``, the in-context examples and the question: the finding between
    ``insert_prefix`` and ``prompt``, lower-cased and with white space collapsed, as in RadAdapt. An encoder-decoder is asked
    with ``source_prefix`` and ``source_prompt`` instead."""

    case_id: Whole
    description: Text
    method: Annotated[Method, must_be(f"one of {', '.join(get_args(Method))}")] = "discrete"
    examples: AtLeastZero = 0
    start_prefix: Text = ""
    insert_prefix: Text = "### findings:"
    prompt: Text = "### impressions:"
    max_new_tokens: AtLeastOne = 200
    source_prefix: Text = "summarize:"
    source_prompt: Text = ""

    @property
    def kind(self) -> str | None:
        """The kind of adapter that the case runs with, as peft calls it; None for the model alone."""
        return None if self.method == "discrete" else self.method.upper()

    @property
    def for_encoder(self) -> "Case":
        """The recipe as an encoder-decoder is asked."""
        return replace(self, insert_prefix=self.source_prefix, prompt=self.source_prompt)

    def question(self, finding: str) -> str:
        """Return the question about ``finding``."""
        return " ".join(f"{self.insert_prefix} {finding} {self.prompt}".lower().split())

    def example(self, report: Report) -> str:
        """Return ``report`` as an in-context example: the question and its answer."""
        return f"{self.question(report.finding)} {' '.join(report.impression.lower().split())}"

    def prompt_text(self, finding: str, examples: Sequence[Report] = ()) -> str:
        """Return the prompt for ``finding``; ``examples`` come first, separated by blank lines."""
        question = self.question(finding)
        if examples:
            question = "\n\n".join(map(self.example, examples)) + "\n" + question
        return f"{self.start_prefix}\n{question}" if self.start_prefix else question

    def prompts(
        self, reports: Sequence[Report], training: Sequence[Report], seed: int, *, same: bool = False
    ) -> list[str]:
        """Return one prompt per report, in order. The in-context examples of each are drawn from ``training`` without
        repeats and without the report itself, by a generator seeded with ``seed``; with ``same`` they are the first report's
        for all others that are not among them. Raises :class:`InputError`."""
        rng = random.Random(seed)
        common: list[Report] = []
        prompts = []
        for report in reports:
            others = [example for example in training if example.finding != report.finding]
            if self.examples > len(others):
                raise InputError(
                    f"case {self.case_id} draws {self.examples} examples, but the training set has {len(others)} reports"
                )
            shares = common and report.finding not in {example.finding for example in common}
            drawn = common if shares else rng.sample(others, self.examples)
            common = drawn if same and not common else common
            prompts.append(self.prompt_text(report.finding, drawn))
        return prompts


def load_cases(path: Path) -> dict[int, Case]:
    """Read every case of a ``cases.yaml``. Raises :class:`InputError` naming the file, the case and the key."""
    return dict(_read(path, path.stat().st_mtime_ns if path.exists() else 0))


@lru_cache  # a grid of a thousand runs would read the file a thousand times
def _read(path: Path, _modified_ns: int) -> dict[int, Case]:
    entries = read_entries(path, "0: {description: null prompt}")
    return {
        number: parse_as(Case, entry, f"{path}, case {number}", case_id=number) for number, entry in entries.items()
    }


def get_case(path: Path, case_id: int) -> Case:
    """Return the case to run. Raises :class:`InputError` for an unknown number."""
    cases = load_cases(path)
    if case_id not in cases:
        raise unknown_name("case", case_id, cases)
    return cases[case_id]
