"""``splitwiser models``."""

import argparse
from pathlib import Path

from splitwiser.config import RunConfig
from splitwiser.model.catalog import CatalogEntry, load_catalog
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
    rows = [(entry.name, _as_dummy(entry), entry.location) for entry in entries]
    print(columns([("model", "without a download, as dummy", "from"), *rows]))


def _as_dummy(entry: CatalogEntry) -> str:
    if entry.kind != "decoder":
        return "encoder-decoder, not served"
    return "yes" if entry.config else "no"
