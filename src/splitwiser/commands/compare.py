"""``splitwiser compare``."""

import argparse

from splitwiser.config import RunConfig
from splitwiser.options import add_options, given_options
from splitwiser.study.peers.program import ENGINES

DESCRIPTION = "Every run is a fresh process, unless --one_process is given; a round runs each variant once."
USAGE = "--modes MODE,MODE... [options of splitwiser run, for all variants]"
ONE_PROCESS = "on a GPU: all runs in one process, one after another, so that imports happen only once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that define the variants, and those of a run."""
    parser.add_argument(
        "--modes", default="", help="variants by mode, such as generate,sequential,mp; the first is the baseline"
    )
    parser.add_argument("--backends", default="", help="each mode on each of these back ends, such as hf,vllm")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="'NAME: OPTIONS'",
        help="a variant by options of splitwiser run, such as 'four: --mode mp --workers configs/workers/four_mixed.yaml'; "
        "may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--peer", action="append", default=[], metavar="ENGINE=ENVIRONMENT",
        help=f"another engine ({', '.join(ENGINES)}) in an environment of scripts/install_peer.sh, or its Python; may be "
        "repeated",
    )  # fmt: skip
    parser.add_argument(
        "--load", type=float,
        help="Poisson arrivals at this fraction, such as 0.6, of the rate at which the first variant answers when all "
        "requests arrive at once, which is measured first",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--minutes", type=float, help="start no further round after this many minutes")
    parser.add_argument("--one_process", "--one-process", action="store_true", help=ONE_PROCESS)
    add_options(parser, RunConfig, defaults=False)


def run(options: argparse.Namespace) -> None:
    """Compare the variants; the comparison prints its own table."""
    from splitwiser.study.compare import compare, make_variants

    modes, backends = _names(options.modes), _names(options.backends)
    variants = make_variants(given_options(options, RunConfig), modes, options.variant, options.peer, backends)
    compare(variants, options.repeats, options.minutes, load=options.load, one_process=options.one_process)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
