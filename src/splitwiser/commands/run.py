"""``splitwiser run``."""

import argparse

from splitwiser.check import check_quickly
from splitwiser.config import RunConfig
from splitwiser.options import add_options, given_options
from splitwiser.placement.modes import find_backend, find_mode
from splitwiser.placement.start import start_fork_server
from splitwiser.results.terminal import run_summary

DESCRIPTION = "Defaults come from src/splitwiser/constants.py. A hyphen may stand for each underscore."
USAGE = "[options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the fields of :class:`RunConfig`."""
    add_options(parser, RunConfig)


def run(options: argparse.Namespace) -> None:
    """Run one job and print its summary."""
    config = RunConfig(**given_options(options, RunConfig))
    job = check_quickly(config)
    mode, backend = find_mode(config.mode), find_backend(config.backend)
    if mode.shares_memory and not backend.package and not mode.needs_gpu:  # whether there is a GPU is found out later
        start_fork_server()
    from splitwiser.run import run as run_job  # takes seconds, so that mistakes are reported first

    result = run_job(config, job)
    print(run_summary(result.figures, result.directory))
