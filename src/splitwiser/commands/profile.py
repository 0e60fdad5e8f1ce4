"""``splitwiser profile``."""

import argparse

from splitwiser.model.checkpoints.catalog import check_model
from splitwiser.options import add_options, given_options
from splitwiser.study.config import ProfileConfig

DESCRIPTION = "Times prefill by prompt length and decode by batch size and context, against what the machine can do."
USAGE = "[options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the fields of :class:`ProfileConfig`."""
    add_options(parser, ProfileConfig)


def run(options: argparse.Namespace) -> None:
    """Profile and print the table."""
    config = ProfileConfig(**given_options(options, ProfileConfig))
    check_model(config.model, config.models)  # before the seconds that importing PyTorch takes
    from splitwiser.study.profile import profile, profile_summary

    print(profile_summary(profile(config)))
