"""``splitwiser advise``."""

import argparse

from splitwiser.model.checkpoints.catalog import check_decoder
from splitwiser.options import add_options, given_options
from splitwiser.study.config import AdviseConfig

DESCRIPTION = "Profiles both phases briefly, predicts every placement, runs the best few. Accepts the options of run."
USAGE = "[options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the fields of :class:`AdviseConfig`."""
    add_options(parser, AdviseConfig)


def run(options: argparse.Namespace) -> None:
    """Advise, and print the table, the recommendation and its reasons."""
    config = AdviseConfig(**given_options(options, AdviseConfig))
    check_decoder(config.model, config.models)  # before the seconds that importing PyTorch takes
    from splitwiser.study.advise import advise
    from splitwiser.study.recommend import advice_summary

    print(advice_summary(advise(config)))
