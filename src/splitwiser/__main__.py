"""``python -m splitwiser``: the same as the ``splitwiser`` command."""

from splitwiser.cli import entry_point

if __name__ == "__main__":
    entry_point()
