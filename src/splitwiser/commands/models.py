"""``splitwiser models``."""

import argparse
import time
from pathlib import Path

from splitwiser.config import RunConfig
from splitwiser.errors import RunError
from splitwiser.model.checkpoints.catalog import CatalogEntry, load_catalog
from splitwiser.options import add_options
from splitwiser.results.terminal import columns
from splitwiser.text import format_size

DESCRIPTION = "The models that --model takes by name, or a proof that an architecture's tokens are those of generate."
USAGE = "[options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file and the check."""
    add_options(parser, RunConfig, ["models"])
    parser.add_argument(
        "--check",
        metavar="MODEL",
        help="build a tiny one with random weights of this model (a name, a checkpoint directory or a hub id) or of this "
        "architecture (a model_type of transformers), and compare the engine's tokens with those of transformers' generate",
    )


def run(options: argparse.Namespace) -> None:
    """List the models known by name, or check one."""
    if options.check is None:
        print(_list_models(options.models))
    else:
        _check(options.check, options.models)


def _list_models(models: str) -> str:
    from splitwiser.model.overview import describe_model

    rows = [("model", "parameters", "in bfloat16", "served by the engine", "adapters", "from")]
    for entry in load_catalog(Path(models)).values():
        found = describe_model(entry, models)
        parameters = "" if found.parameters is None else _count(found.parameters)
        nbytes = "" if found.nbytes is None else format_size(found.nbytes)
        rows.append(
            (entry.name, parameters, nbytes, found.route or f"no: {found.problem}", found.adapters, _place(entry))
        )
    return columns(rows)


def _place(entry: CatalogEntry) -> str:
    return f"{entry.location} (or dummy weights)" if entry.config else entry.location


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _check(model: str, models: str) -> None:
    """Print what is shown of ``model``. Raises :class:`RunError` with the reason if it is not served exactly."""
    from splitwiser.study.identity import LENGTHS, NEW_TOKENS, find_config, prove

    began = time.perf_counter()
    config = find_config(model, models)
    proof = prove(config)
    name = f"{model}: {proof.class_name}, shrunk to {config.get_text_config().num_hidden_layers} layers"
    if proof.problem:
        raise RunError(f"{name}: {proof.problem}")
    bfloat16 = (
        f"refused: {proof.half_problem}" if proof.half_problem else "packed logits are those of each prompt alone"
    )
    print(
        columns(
            [
                ("model", name),
                ("route", proof.route),
                *((run, f"{len(LENGTHS)} prompts, {NEW_TOKENS} tokens each: those of generate") for run in proof.shown),
                ("bfloat16", bfloat16),
                ("took", f"{time.perf_counter() - began:.1f} s"),
            ]
        )
    )
