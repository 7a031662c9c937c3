#!/usr/bin/env bash
# Runs every test that needs a GPU from what `./dev bundle` packed: one line of result each, logs in
# logs/ (or $OUT/logs). Needs a driver, glibc of Debian 12 or newer, tar and xz or python3.
#   run_gpu_tests.sh [NAME...]   all, or those whose name contains a NAME
#   run_gpu_tests.sh --list      the names
#   run_gpu_tests.sh --sanitizers [TOOL...]   compute-sanitizer's four tools over small shapes of every
#                                operation and type, at most two minutes each
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
logs=${OUT:-$here}/logs
device=${STAGECOACH_TEST_DEVICE:-cuda:0}
failed=0

unpack() {
  [ "$here/programs.tar.xz" -nt "$here/bin/.unpacked" ] || return 0
  if command -v xz >/dev/null; then
    tar -C "$here" -xJf "$here/programs.tar.xz"
  else
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' \
      "$here/programs.tar.xz" "$here"
  fi
  touch "$here/bin/.unpacked"
}

find_data() {  # beside this script, or in the checkout that it lies in
  local folder
  for folder in "${STAGECOACH_SOURCE_DIR:-}" "$here" "$here/../.."; do
    if [ -n "$folder" ] && [ -f "$folder/tests/data/demo-Q4_K_M.gguf" ]; then
      STAGECOACH_SOURCE_DIR=$(cd "$folder" && pwd)
      export STAGECOACH_SOURCE_DIR
      return 0
    fi
  done
  echo "no tests/data here: use ./dev bundle --data, or set STAGECOACH_SOURCE_DIR" >&2
  exit 2
}

run() {  # name command...
  local name=$1 log=$logs/$1.log start=$SECONDS result=ok detail
  shift
  "$@" >"$log" 2>&1 || result="FAILED ($?)"
  if [ "$result" = ok ] && grep -q ': Skipped$' "$log"; then
    result=SKIPPED
    detail=$(grep -m 1 -A 1 ': Skipped$' "$log" | tail -n 1)
  else  # what the program says of itself: gtest's counts and a sanitizer's, or else its last line
    detail=$(sed -n 's/^\[  \(PASSED\|FAILED\)  \] \([0-9]* test.*\)/\1 \2/p' "$log" | tr '\n' ' ')
    detail+=$(sed -n 's/^=* \([A-Z]* SUMMARY: .*\)/\1/p' "$log" | tail -n 1)
    [ -n "$detail" ] || detail=$(tail -n 1 "$log")
  fi
  printf '%-10s %-24s %4d s  %s\n' "$result" "$name" $((SECONDS - start)) "$detail"
  case $result in FAILED*) failed=1 ;; esac
}

on_device() { STAGECOACH_TEST_DEVICE=$device "$@"; }

tests=(conformance head golden residual upload matmul_check nccl_library parity bit_equality process
  process_nccl up)
run_test() {
  local bin=$here/bin model=$STAGECOACH_SOURCE_DIR/tests/data/demo-Q4_K_M.gguf
  case $1 in
    conformance | head | golden | residual | upload) run "$1" "$bin/cuda_${1}_test" ;;
    matmul_check) run "$1" "$bin/quant_matmul_bench" check ;;
    parity | bit_equality) run "$1" on_device "$bin/${1}_test" ;;
    nccl_library) run "$1" "$bin/worker_nccl_library_test" ;;
    process | process_nccl) run "$1" "$bin/${1}_test" ;;
    up) run "$1" "$bin/stagecoach" up --once --model "$model" --workers 2 --device "$device" \
          --prompt '[INST] Tell me a story about a fox and a lantern. [/INST]' ;;
  esac
}

sanitize() {  # [tool...]
  local sanitizer tool
  sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
    echo "no compute-sanitizer here (it comes with the CUDA toolkit)" >&2
    exit 2
  }
  [ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck
  for tool in "$@"; do  # synccheck counts the barriers of copies, thousands at a time
    run "$tool" timeout 120 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      $([ "$tool" = synccheck ] && echo --num-cuda-barriers 65536) \
      "$here/bin/cuda_conformance_test" --gtest_filter='*SmallShapesOfEverything'
  done
}

if [ "${1:-}" = --list ]; then
  printf '%s\n' "${tests[@]}"
  exit 0
fi
mkdir -p "$logs"
unpack
find_data
export STAGECOACH_BIN_DIR=$here/bin
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null ||
  echo "no nvidia-smi here"
if [ "${1:-}" = --sanitizers ]; then
  shift
  sanitize "$@"
  exit "$failed"
fi
for name in "${tests[@]}"; do
  for wanted in "${@:-}"; do
    [[ $name == *"$wanted"* ]] && run_test "$name" && break
  done
done
exit "$failed"
