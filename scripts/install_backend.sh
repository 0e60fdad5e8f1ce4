#!/usr/bin/env bash
# usage: scripts/install_backend.sh vllm [DIR]
# Makes the Python environment of a back end, beside this project's, by default where `--backend vllm` looks for it:
# .venv-vllm in this checkout. For another DIR give `--backend_python DIR`.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "$1" != vllm ]; then
    echo "usage: $0 vllm [DIR]" >&2
    exit 2
fi
here=$(dirname "$(readlink -f "$0")")
dir=${2:-$(dirname "$here")/.venv-vllm}
"$here/install_peer.sh" vllm "$dir"
echo "ready: splitwiser run --backend vllm$([ $# -eq 2 ] && echo " --backend_python $dir" || true)"
