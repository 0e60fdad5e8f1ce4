#!/usr/bin/env bash
# Checks everything that needs a GPU and measures every mode there, within 9 minutes on a data-centre card:
#     scripts/gpu_check.sh FOLDER
# Runs from a bare checkout with any Python that has torch, transformers, pandas and pytest ($PYTHON, or python3); installs
# nothing and needs no network. All it finds is written under FOLDER, and a short table comes last.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: scripts/gpu_check.sh FOLDER" >&2; exit 2; }
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$project/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" "$project/scripts/gpu_check.py" "$1"
