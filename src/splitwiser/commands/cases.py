"""``splitwiser cases``."""

import argparse
from pathlib import Path

from splitwiser.config import RunConfig
from splitwiser.options import add_options
from splitwiser.results.terminal import columns
from splitwiser.workload.cases import load_cases

DESCRIPTION = "The prompting recipes that --case_id chooses from."
USAGE = "[options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file."""
    add_options(parser, RunConfig, ["cases"])


def run(options: argparse.Namespace) -> None:
    """List the prompting recipes."""
    rows = [
        (
            str(case.case_id),
            case.description,
            "" if case.kind is None else "the model's own, or --adapter NAME=DIRECTORY",
        )
        for case in load_cases(Path(options.cases)).values()
    ]
    print(columns([("case_id", "description", "adapter"), *rows]))
