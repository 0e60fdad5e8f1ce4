#!/usr/bin/env bash
# usage: scripts/test_instruction_sets.sh [pytest's arguments]
# Runs the tests of what depends on the processor's instruction set once for each set that this machine has: with oneDNN held
# to it, and with this project's own functions compiled for lesser ones. Says which sets it left out, and why; a line a set at
# the end, and exit code 1 if one is red.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
cd "$project"
export OMP_WAIT_POLICY=passive
unset ONEDNN_MAX_CPU_ISA SPLITWISER_MARCH
files=(
    tests/model/test_paged_attention.py tests/model/test_compatibility.py tests/model/test_direct.py tests/model/test_fusing.py
    tests/model/kernels/test_build.py tests/model/kernels/test_choose.py tests/model/kernels/test_cpu_attention.py
    tests/model/kernels/test_packed_linear.py tests/model/kernels/test_int8_linear.py tests/model/kernels/test_tiles.py
    tests/end_to_end/test_token_identity.py tests/end_to_end/test_int8.py
)
# name | environment | what /proc/cpuinfo must list
sets=(
    "oneDNN held to AVX2|ONEDNN_MAX_CPU_ISA=AVX2|avx2"
    "oneDNN held to AVX512_CORE|ONEDNN_MAX_CPU_ISA=AVX512_CORE|avx512f avx512bw avx512vl avx512dq"
    "oneDNN held to AVX512_CORE_BF16|ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16|avx512_bf16"
    "oneDNN held to AVX512_CORE_AMX|ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX|amx_tile amx_bf16"
    "compiled without AVX-512|SPLITWISER_MARCH=x86-64-v3|avx2 fma bmi2"
    "compiled without AVX|SPLITWISER_MARCH=x86-64|sse2"
    "compiled without bfloat16 pairs|SPLITWISER_MARCH=x86-64-v4|avx512f avx512bw avx512vl avx512dq avx512cd"
    "compiled with VNNI and without bfloat16 pairs|SPLITWISER_MARCH=icelake-server|avx512_vnni avx512_vbmi2 gfni vaes"
    "compiled without AMX|SPLITWISER_MARCH=cooperlake|avx512_bf16 avx512_vnni"
)
has=" $(grep -m1 '^flags' /proc/cpuinfo || true) "
summary=() red=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for each in "${sets[@]}"; do
    IFS='|' read -r name setting needed <<<"$each"
    missing=
    for feature in $needed; do [[ $has == *" $feature "* ]] || missing+=" $feature"; done
    if [ -n "$missing" ]; then
        summary+=("left out  $name: this processor has no$missing")
        continue
    fi
    echo "== $name ($setting)"
    if env "$setting" "$PYTHON" -m pytest -rs "${files[@]}" "$@" 2>&1 | tee "$log"; then
        verdict=green
    else
        verdict=red red=1
    fi
    summary+=("$(printf %-8s $verdict)  $name: $(tail -n 1 "$log")")
done
printf '%s\n' "== summary" "${summary[@]}"
exit $red
