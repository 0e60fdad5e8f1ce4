#!/usr/bin/env bash
# usage: scripts/test_stand_in.sh [--environment DIR] [pytest's arguments]
# Runs the tests of what needs a GPU on a machine without one, on a stand-in for it (tests/support/stand_in). They need
# PyTorch for CUDA, which is not that of .venv: its environment, 5 GB, is made in .venv-cuda, or DIR is one that is there.
set -euo pipefail
project=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
environment=$project/.venv-cuda

if [ "${1:-}" = --environment ]; then
    environment=$(cd "${2:?--environment needs a folder}" && pwd)
    shift 2
elif ! cmp -s "$project/env/requirements-cuda.txt" "$environment/splitwiser-pins"; then
    echo "setting up $environment (5 GB, once)" >&2
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip --disable-pip-version-check install --quiet -r "$project/env/requirements-cuda.txt"
    cp "$project/env/requirements-cuda.txt" "$environment/splitwiser-pins"
fi
cd "$project"
export PYTHONPATH=src OMP_WAIT_POLICY=passive
exec "$environment/bin/python" -m pytest -m stand_in tests "$@"
