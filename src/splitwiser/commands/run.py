"""``splitwiser run``."""

import argparse

from splitwiser.config import RunConfig
from splitwiser.options import add_options, given_options
from splitwiser.results.terminal import run_summary

DESCRIPTION = "Defaults come from src/splitwiser/constants.py. A hyphen may stand for each underscore."
USAGE = "[options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the fields of :class:`RunConfig`."""
    add_options(parser, RunConfig)


def run(options: argparse.Namespace) -> None:
    """Run one job and print its summary."""
    config = RunConfig(**given_options(options, RunConfig))
    from splitwiser.run import run as run_job

    result = run_job(config)
    print(run_summary(result.figures, result.directory))
