"""Writes the pages of the documentation that follow from the code: docs/columns.md, every column of the CSV files, and
docs/commands.md, every option; and docs/architectures.md, from the record of scripts/check_architectures.py.

    python scripts/write_docs.py
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import check_architectures

from splitwiser import constants
from splitwiser.cli import COMMANDS
from splitwiser.results import schema
from splitwiser.study import advise, compare, identity, profile, sweep

DOCS = constants.DIR_PROJECT / "docs"
TABLES: dict[str, Mapping[str, Sequence[schema.Column]]] = {
    "run": schema.TABLES,
    "compare": compare.TABLES,
    "sweep": sweep.TABLES,
    "profile": profile.TABLES,
    "advise": advise.TABLES,
}


def describe_columns() -> str:
    """Return the page of columns in Markdown."""
    parts = [
        "# Columns of the CSV files\n",
        "Written by `scripts/write_docs.py` from the code that writes the files.\n",
    ]
    for command, tables in TABLES.items():
        parts += [f"## splitwiser {command}\n", schema.describe_columns(tables)]
    return "\n".join(parts)


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return a parser of the options of ``command``."""
    module = import_module(f"splitwiser.commands.{command}")
    parser = argparse.ArgumentParser(usage=f"splitwiser {command} {module.USAGE}", add_help=False, allow_abbrev=False)
    module.add_arguments(parser)
    return parser


def describe_commands() -> str:
    """Return the page of commands in Markdown."""
    parts = [
        "# Commands\n",
        "Written by `scripts/write_docs.py` from the options' declarations; `splitwiser COMMAND --help` shows the same. "
        "Defaults that you may want to change for good are in `src/splitwiser/constants.py`.\n",
    ]
    for name, about in COMMANDS.items():
        parser = parser_of(name)
        parts += [f"## splitwiser {name}\n", f"{about[0].upper()}{about[1:]}.\n", f"```text\n{parser.usage}\n```\n"]
        rows = [_row(action) for action in parser._actions if action.default != argparse.SUPPRESS]
        if rows:
            parts += ["| option | default | meaning |\n|---|---|---|", *rows, ""]
        if len(rows) < len(parser._actions):
            parts.append("Options of `splitwiser run` may follow.\n")
    return "\n".join(parts)


def _row(action: argparse.Action) -> str:
    spelling = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
    if isinstance(action, argparse.BooleanOptionalAction):
        spelling += f", {action.option_strings[-1]}"
    default = "" if action.default in (None, "", []) else str(action.default).replace(f"{constants.DIR_PROJECT}/", "")
    meaning = (action.help or "").replace("|", "\\|")
    return f"| `{spelling}` | {f'`{default}`' if default else ''} | {meaning} |"


def describe_architectures() -> str:
    """Return the page of architectures in Markdown."""
    rows = check_architectures.read_record().values()
    served, refused = ([row for row in rows if bool(row["problem"]) == wanted] for wanted in (False, True))
    classes = len({row["class"] for row in served})
    parts = [
        "# Architectures\n",
        "Written by `scripts/write_docs.py` from `results/reference/architectures.csv`, which "
        "`scripts/check_architectures.py` writes. It tries every causal language model and encoder-decoder for text of "
        "transformers as a tiny one with random weights, as `splitwiser models --check NAME` does. The "
        f"{len(served)} architectures below ({classes} classes) gave the tokens of `model.generate`, in float32 and greedy, "
        f"for {len(identity.LENGTHS)} prompts of "
        f"{min(identity.LENGTHS)} to {max(identity.LENGTHS)} tokens: packed, in mode `sequential`; split over steps with "
        "arrivals one after another; and so in mode `mp`. *bfloat16* says whether packed logits then are those of each "
        "prompt alone. *packed* is the route: requests lie one after another in a row, without padding.\n",
        "## Served\n",
        "| architecture | class | route | tokens as `generate`'s | bfloat16 | transformers | torch | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    parts += [_cells(row, ("class", "route", "shown", "bfloat16", "transformers", "torch", "date")) for row in served]
    parts += [
        "\n## Not served by the engine\n",
        "`--mode generate` runs those that are language models of their own.\n",
        "| architecture | reason | transformers | date |",
        "|---|---|---|---|",
    ]
    return "\n".join([*parts, *(_cells(row, ("problem", "transformers", "date")) for row in refused), ""])


def _cells(row: Mapping[str, str], names: Sequence[str]) -> str:
    return " | ".join([f"| `{row['architecture']}`", *(row[name].replace("|", "\\|") for name in names)]) + " |"


PAGES: dict[str, Callable[[], str]] = {
    "columns.md": describe_columns,
    "commands.md": describe_commands,
    "architectures.md": describe_architectures,
}

if __name__ == "__main__":
    for name, describe in PAGES.items():
        (DOCS / name).write_text(describe(), encoding="utf-8")
