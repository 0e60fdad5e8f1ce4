"""``splitwiser models``."""

import argparse

from splitwiser import constants
from splitwiser.model.catalog import CatalogEntry, load_catalog
from splitwiser.results.terminal import columns

DESCRIPTION = "The models of configs/models.yaml."
USAGE = "[options]"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Add nothing."""


def run(_: argparse.Namespace) -> None:
    """List the models known by name."""
    entries = load_catalog(constants.DIR_CONFIGS / "models.yaml").values()
    rows = [(entry.name, entry.path or entry.hub, _as_dummy(entry)) for entry in entries]
    print(columns([("model", "from", "without a download, as dummy"), *rows]))


def _as_dummy(entry: CatalogEntry) -> str:
    if entry.kind != "decoder":
        return "encoder-decoder, not served"
    return "yes" if entry.config else "no"
