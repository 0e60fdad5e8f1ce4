"""``python -m splitwiser``: the same as the ``splitwiser`` command."""

from splitwiser.cli import entry_point

entry_point()
