"""``splitwiser doctor``."""

import argparse
import json
from dataclasses import fields

from splitwiser.config import RunConfig
from splitwiser.doctor.config import DoctorConfig
from splitwiser.doctor.diagnose import diagnose
from splitwiser.errors import RunError
from splitwiser.options import add_options

DESCRIPTION = "Exit code 0 if at least one mode will work for the model, else 1."
USAGE = "[options]"
_ASKED = [field.name for field in fields(DoctorConfig)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run that the doctor checks, and its own."""
    add_options(parser, RunConfig, _ASKED)
    parser.add_argument("--hub", action="store_true", help="also check that the hub can be reached and has the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> None:
    """Print the diagnosis. Raises :class:`RunError` if no mode will work."""
    diagnosis = diagnose(DoctorConfig(**{name: getattr(options, name) for name in _ASKED}))
    print(json.dumps(diagnosis.as_dict(), indent=2) if options.json else diagnosis)
    if not diagnosis.works:
        raise RunError("no mode will work here; the reasons are above")
