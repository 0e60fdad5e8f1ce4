"""``splitwiser models``."""

import argparse
from pathlib import Path

from splitwiser.config import RunConfig
from splitwiser.model.catalog import load_catalog
from splitwiser.options import add_options
from splitwiser.results.terminal import columns

DESCRIPTION = "The models that --model takes by name."
USAGE = "[options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file."""
    add_options(parser, RunConfig, ["models"])


def run(options: argparse.Namespace) -> None:
    """List the models known by name."""
    entries = load_catalog(Path(options.models)).values()
    rows = [(entry.name, entry.kind, "yes" if entry.config else "no", entry.location) for entry in entries]
    print(columns([("model", "kind", "without a download, as dummy", "from"), *rows]))
