#!/usr/bin/env bash
# Sets up and runs the whole test suite: linter, type checker, tests. Arguments go to pytest; without any, two tests run side
# by side.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
cd "$project"
if [ $# -eq 0 ]; then set -- -n 2 --dist worksteal; fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest "$@"
