#!/usr/bin/env bash
# Checks what needs a GPU and measures every mode there, stage by stage: scripts/gpu_check.sh --help
# Runs from a bare checkout with any Python that has the dependencies of pyproject.toml (rouge-score may be missing), pytest,
# pytest-timeout and pytest-xdist ($PYTHON, or python3); installs nothing and needs no network.
set -euo pipefail
project=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH="$project/src:$project/scripts${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/splitwiser-triton-$(id -u)}" # the home may not be writable
exec "${PYTHON:-python3}" "$project/scripts/gpu_check.py" "$@"
