"""The program of a worker process: ``PYTHON program.py RECEIVE SEND``, with the numbers of its pipes to the parent.

``PYTHON program.py probe`` only imports what a worker needs.

vLLM's environment need not have this package, and must not see the packages beside it: so it is imported from where this
file lies, by itself.
"""

import importlib.util
import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Import this package, and run a worker or the probe."""
    package = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[package.name] = module
    spec.loader.exec_module(module)
    if sys.argv[1:] == ["probe"]:
        import_module("splitwiser.vllm_backend.engine")
        return
    from splitwiser.vllm_backend.worker import worker_main

    worker_main(int(sys.argv[1]), int(sys.argv[2]))


if __name__ == "__main__":
    main()
