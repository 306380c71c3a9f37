#!/usr/bin/env bash
# All four tools of compute-sanitizer over the kernels, on shapes with ragged edges:
#
#     benchmarks/sanitize.sh [memcheck|racecheck|initcheck|synccheck ...]
#
# Needs an NVIDIA GPU and compute-sanitizer (part of the CUDA toolkit). Takes tens of minutes; the
# GPU day runs only racecheck and memcheck, over two blocks and the Hopper kernel. PYTHON=python3 uses
# another Python than .venv's.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)

command -v compute-sanitizer >/dev/null || {
    echo "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit" >&2
    exit 2
}
# torch's allocator would hide accesses beyond a tensor inside its own large blocks
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

# Values, layouts and gradients in every type: the oracle's kernels are checked with ours.
tests=(-m pytest -q -x -p no:cacheprovider tests/smlp_kernels/test_mix.py
    tests/smlp_kernels/test_gradients.py -k "test_values or test_layouts")
# Nothing but our kernels and torch's elementwise ones, and memory that is not filled beforehand:
# the tests fill theirs with NaN, after which initcheck takes all of it for written, and racecheck
# would report on matrix products that are not ours.
block=(-m benchmarks.standalone compile)
shapes=(rehearsal-7 rehearsal-8x32 rehearsal-14)

status=0
printed=$(mktemp)
trap 'rm -f "$printed"' EXIT
# The verdict is the summary, not the exit status: a program that a finding kills has its own.
check() {
    echo "== $1: $python ${*:2}"
    compute-sanitizer --tool "$1" "$python" "${@:2}" 2>&1 | tee "$printed" || status=1
    grep -Eq '(ERROR|RACECHECK) SUMMARY: 0 ' "$printed" || status=1
    ! grep -Eq '(ERROR|RACECHECK) SUMMARY: [1-9]' "$printed" || status=1
}
for tool in "${tools[@]}"; do
    case $tool in
        memcheck | synccheck) check "$tool" "${tests[@]}" ;;
        racecheck | initcheck) for shape in "${shapes[@]}"; do check "$tool" "${block[@]}" "$shape"; done ;;
        *)
            echo "expected memcheck, racecheck, initcheck or synccheck, got $tool" >&2
            exit 2
            ;;
    esac
done
exit $status
