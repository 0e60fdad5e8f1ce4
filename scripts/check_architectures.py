"""Proves the tokens of every causal language model of transformers, each as a tiny one with random weights, and records what
was found in results/reference/architectures.csv, from which scripts/write_docs.py makes docs/architectures.md.

    python scripts/check_architectures.py             # all: about fifteen minutes on two cores that have nothing else to do
    python scripts/check_architectures.py llama opt   # only these; the rows of others stay
"""

import csv
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from splitwiser import constants
from splitwiser.errors import first_line
from splitwiser.files import write_rows
from splitwiser.model.tiny import tiny_config
from splitwiser.study.identity import Proof, prove

RECORD = constants.DIR_PROJECT / "results" / "reference" / "architectures.csv"
COLUMNS = ("architecture", "class", "route", "shown", "bfloat16", "problem", "transformers", "torch", "date")


def read_record() -> dict[str, dict[str, str]]:
    """Return the rows of the record by architecture; none if there is no record yet."""
    if not RECORD.exists():
        return {}
    with RECORD.open(encoding="utf-8", newline="") as file:
        return {row["architecture"]: row for row in csv.DictReader(file)}


def check(architecture: str) -> dict[str, str]:
    """Return the row of one architecture."""
    try:
        proof = prove(tiny_config(architecture))
    except Exception as error:  # figures that contradict each other raise various errors
        proof = Proof(architecture, problem=f"cannot be tried: {type(error).__name__}: {first_line(error)}")
    return {
        "architecture": architecture,
        "class": proof.class_name,
        "route": proof.route,
        "shown": ", ".join(proof.shown),
        "bfloat16": "" if proof.problem else proof.half_problem or "yes",
        "problem": proof.problem,
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def main(architectures: Sequence[str]) -> None:
    """Check ``architectures`` and write their rows, each as soon as it is found."""
    transformers.logging.set_verbosity_error()
    for architecture in architectures:
        row = check(architecture)
        rows = {**read_record(), architecture: row}
        write_rows(RECORD, COLUMNS, [rows[name] for name in sorted(rows)])
        print(f"{architecture}: {row['problem'] or row['shown']}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
