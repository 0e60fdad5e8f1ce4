#!/usr/bin/env bash
# Sets up and runs the whole test suite: linter, type checker, tests. Arguments go to pytest; without any, two test files
# run side by side, and the slow tests that build an environment in a clean clone run too.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
cd "$project"
if [ $# -eq 0 ]; then set -- --setup -n 2 --dist loadfile --no-loadscope-reorder; fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest "$@"
