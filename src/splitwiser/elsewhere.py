"""Runs a module of this package in another Python environment: ``PYTHON elsewhere.py MODULE ARGUMENT...`` calls its ``main``
with the arguments; without any, it only imports the module.

That environment need not have this package, and must not see the packages beside it: so it is imported from where this file
lies, by itself.
"""

import importlib.util
import sys
from importlib import import_module
from pathlib import Path

PROGRAM = Path(__file__).resolve()


def main() -> None:
    """Import this package and the module, and call that."""
    spec = importlib.util.spec_from_file_location(
        "splitwiser", PROGRAM.with_name("__init__.py"), submodule_search_locations=[str(PROGRAM.parent)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules["splitwiser"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    module = import_module(sys.argv[1])
    if arguments := sys.argv[2:]:
        module.main(arguments)


if __name__ == "__main__":
    main()
