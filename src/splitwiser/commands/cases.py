"""``splitwiser cases``."""

import argparse

from splitwiser import constants
from splitwiser.results.terminal import columns
from splitwiser.workload.cases import load_cases

DESCRIPTION = "The recipes of configs/cases.yaml."
USAGE = "[options]"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Add nothing."""


def run(_: argparse.Namespace) -> None:
    """List the prompting recipes."""
    rows = [
        (str(case.case_id), case.description, "" if case.method == "discrete" else "not supported yet")
        for case in load_cases(constants.DIR_CONFIGS / "cases.yaml").values()
    ]
    print(columns([("case_id", "description", ""), *rows]))
