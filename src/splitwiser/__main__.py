"""``python -m splitwiser``: the same as the ``splitwiser`` command."""

import os
import sys
from pathlib import Path

if not sys.flags.safe_path:
    folder = sys.path.pop(0)  # the current one, where a file of the user's own may have the name of a module
    if Path(folder) == Path(__file__).parents[1]:  # our processes find this package where it was found
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))

from splitwiser.cli import entry_point  # after the path is clean

if __name__ == "__main__":
    entry_point()
