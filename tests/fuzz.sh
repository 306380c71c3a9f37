#!/usr/bin/env bash
# A long fuzzing run, in parts of 500 random blocks, each with its own seed:
#   tests/fuzz.sh [CASES] [PROCESSES] [FIRST_SEED] > log  (by default 10000, all cores, seeds from 1)
# A part that fails prints its smallest failing block; to repeat it, use its seed:
#   SMLP_FUZZ_CASES=500 python -m pytest tests/smlp_kernels/test_fuzz.py --hypothesis-seed=SEED
# PYTHON names the interpreter, .venv/bin/python if not set. Exits with 1 if any part failed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-.venv/bin/python} SMLP_FUZZ_CASES=500
processes=${2:-$(nproc)} parts=$(((${1:-10000} + SMLP_FUZZ_CASES - 1) / SMLP_FUZZ_CASES))
first=${3:-1}
export OMP_NUM_THREADS=1

part() {
    local result=passed output
    output=$("$PYTHON" -m pytest -q -p no:cacheprovider --hypothesis-seed="$1" \
        tests/smlp_kernels/test_fuzz.py 2>&1) || result=FAILED
    printf 'seed %s: %s cases %s; %s\n' "$1" "$SMLP_FUZZ_CASES" "$result" "$(tail -n 1 <<<"$output")"
    [ "$result" = passed ] || { printf '%s\n' "$output"; return 1; }
}
export -f part

"$PYTHON" -c 'import platform, torch, triton
from datetime import UTC, datetime
from benchmarks.environment import commit
print(f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, "
      f"GPU {torch.cuda.get_device_name() if torch.cuda.is_available() else None}")
print(f"commit {commit()}, {datetime.now(UTC):%Y-%m-%dT%H:%MZ}")'
status=0
seq "$first" $((first + parts - 1)) | xargs -P "$processes" -I{} bash -c 'part {}' || status=1
printf '%s parts of %s cases, %s\n' "$parts" "$SMLP_FUZZ_CASES" "$([ $status = 0 ] && echo 'all passed' || echo 'some FAILED')"
exit $status
