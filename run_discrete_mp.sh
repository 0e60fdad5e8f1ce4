#!/usr/bin/env bash
# Runs the main job in mode mp; any option of `splitwiser run` may follow. Defaults: src/splitwiser/constants.py.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/setup.sh"
exec "$PYTHON" -m splitwiser run --mode mp "$@"
