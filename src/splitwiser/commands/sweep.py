"""``splitwiser sweep``."""

import argparse
from pathlib import Path

from splitwiser import constants
from splitwiser.commands.compare import ONE_PROCESS
from splitwiser.config import check_results
from splitwiser.files import find_config

DESCRIPTION = "Runs that have finished are kept; those that failed are tried again at the next start."
USAGE = "FILE [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file of the grid and the options of its execution."""
    parser.add_argument(
        "file", metavar="FILE", help="the grid: a YAML file, or a name of configs/sweeps, such as example"
    )
    parser.add_argument("--list", action="store_true", help="print the points and run nothing")
    parser.add_argument("--one_process", "--one-process", action="store_true", help=ONE_PROCESS)
    parser.add_argument("--fresh", action="store_true", help="start over; the old results are kept under another name")
    parser.add_argument(
        "--results", default=str(constants.DIR_RESULTS), help="directory that gets a folder for this sweep"
    )


def run(options: argparse.Namespace) -> None:
    """Run the grid, or list its points."""
    from splitwiser.study.sweep import list_points, read_sweep, sweep

    check_results(options.results)
    file, results = find_config("sweeps", options.file, "sweep"), Path(options.results)
    grid = read_sweep(file)
    if options.list:
        print(list_points(grid, results))
    else:
        sweep(grid, file, results, fresh=options.fresh, one_process=options.one_process)
