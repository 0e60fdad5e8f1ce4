"""``splitwiser report``."""

import argparse
from pathlib import Path

DESCRIPTION = "Runs given together are compared. The page needs no network and no other file."
USAGE = "RUN... [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folders and the page's path."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="folder that a command wrote")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the first folder)")


def run(options: argparse.Namespace) -> None:
    """Write the page and print where it is."""
    from splitwiser.results.report import write_report  # imports matplotlib and pandas

    print(write_report(options.folders, options.output))
