#!/usr/bin/env bash
# Runs every test that needs a GPU from what `./dev bundle` packed: one line of result each, logs in
# logs/ (or $OUT/logs). Needs a driver, glibc of Debian 12 or newer, tar and xz or python3.
#   run_gpu_tests.sh [NAME...]   all, or those whose name contains a NAME
#   run_gpu_tests.sh --list      the names
#   run_gpu_tests.sh --sanitizers [TOOL...] [CASE...]   compute-sanitizer's four tools, or these, over
#                                small shapes of every operation and type, or those whose name contains
#                                a CASE: a process each, of at most SANITIZER_SECONDS (60), as many at
#                                once as SANITIZER_JOBS (4)
# Exit code: 0 if nothing failed (what is skipped says so), 1 if something did or had findings or was
# cut off, 2 if it could not begin.
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

passed_tests() { sed -n 's/^\[  PASSED  \] \([0-9]*\) test.*/\1/p' "$1"; }

skip_reason() {  # log: the first one, if a test was skipped
  { grep -m 1 -A 1 ': Skipped$' "$1" || true; } | tail -n 1
}

report() {  # result name seconds detail
  printf '%-10s %-34s %4d s  %s\n' "$@"
}

run() {  # name command...
  local name=$1 log=$logs/$1.log start=$SECONDS result=ok detail reason
  shift
  "$@" >"$log" 2>&1 || result="FAILED ($?)"
  reason=$(skip_reason "$log")
  # What the program says of itself: gtest's counts, or else its last line.
  detail=$(sed -n 's/^\[  \(PASSED\|SKIPPED\|FAILED\)  *\] \([0-9]* test.*\)/\1 \2/p' "$log" |
    tr -d ',:' | tr '\n' ' ')
  [ -n "$detail" ] || detail=$(tail -n 1 "$log")
  if [ -n "$reason" ]; then
    detail+=": $reason"
    [ "$result" != ok ] || [ "$(passed_tests "$log")" != 0 ] || result=SKIPPED
  fi
  report "$result" "$name" $((SECONDS - start)) "$detail"
  case $result in FAILED*) failed=1 ;; esac
}

on_device() { STAGECOACH_TEST_DEVICE=$device "$@"; }

tests=(attention conformance head golden residual upload matmul_check nccl_library parity
  bit_equality process process_nccl up)
run_test() {
  local bin=$here/bin model=$STAGECOACH_SOURCE_DIR/tests/data/demo-Q4_K_M.gguf
  case $1 in
    attention | conformance | head | golden | residual | upload) run "$1" "$bin/cuda_${1}_test" ;;
    matmul_check) run "$1" "$bin/quant_matmul_bench" check ;;
    parity | bit_equality) run "$1" on_device "$bin/${1}_test" ;;
    nccl_library) run "$1" "$bin/worker_nccl_library_test" ;;
    process | process_nccl) run "$1" "$bin/${1}_test" ;;
    up) run "$1" "$bin/stagecoach" up --once --model "$model" --workers 2 --device "$device" \
          --prompt '[INST] Tell me a story about a fox and a lantern. [/INST]' ;;
  esac
}

tools=(memcheck racecheck initcheck synccheck)

sanitizer_cases() {  # a line each: name, program, its filter
  "$here/bin/cuda_conformance_test" --gtest_list_tests --gtest_filter='Small/*' |
    awk '/^[^ ].*\.$/ { suite = $1 }
         /^  / { n = split($1, part, "/"); print part[n], "cuda_conformance_test", suite $1 }'
  echo Merges cuda_attention_test '*.WaysOfASmallStepAgree'
  echo TopLogits cuda_head_test '*.TopOfSmallVocabularies'
  echo Draws cuda_head_test '*.DrawsFromASmallVocabulary'
  echo Picks cuda_head_test '*.PicksFromASmallVocabulary'
  echo Residual cuda_residual_test '*'
}

sanitize_case() {  # sanitizer tool name program filter
  local sanitizer=$1 tool=$2 name=$3 log=$logs/$2.$3.log start=$SECONDS code=0 result detail flags=()
  # synccheck counts the barriers of copies, thousands at a time.
  [ "$tool" != synccheck ] || flags=(--num-cuda-barriers 16384)
  timeout -k 5 "${SANITIZER_SECONDS:-60}" "$sanitizer" --tool "$tool" --error-exitcode 9 "${flags[@]}" \
    "$here/bin/$4" --gtest_filter="$5" </dev/null >"$log" 2>&1 || code=$?
  detail=$(sed -n 's/^=* \([A-Z]* SUMMARY: .*\)/\1/p' "$log" | tail -n 1)
  case $code in
    0) result=ok ;;
    9) result=FINDINGS ;;
    124 | 137) result='TIMED OUT' detail="after: $(tail -n 1 "$log")" ;;
    *) result="FAILED ($code)" ;;
  esac
  if [ "$result" = ok ] && [ "$(passed_tests "$log")" = 0 ] && grep -q ': Skipped$' "$log"; then
    result=SKIPPED detail=$(skip_reason "$log")
  elif [ "$result" = ok ] && { [ -z "$detail" ] || ! passed_tests "$log" | grep -q '^[1-9]'; }; then
    result=FAILED detail="no test ran, or $tool did not: see $log"  # nothing was shown
  fi
  report "$result" "$tool $name" $((SECONDS - start)) "${detail:-see $log}"
  case $result in ok | SKIPPED) ;; *) echo "$tool $name" >>"$logs/sanitizers.failed" ;; esac
}

sanitize() {  # [tool...] [case...]
  local sanitizer tool word chosen=() wanted=() name program filter count=0
  sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
    echo "no compute-sanitizer here (it comes with the CUDA toolkit)" >&2
    exit 2
  }
  for word in "$@"; do
    case " ${tools[*]} " in *" $word "*) chosen+=("$word") ;; *) wanted+=("$word") ;; esac
  done
  [ ${#chosen[@]} -gt 0 ] || chosen=("${tools[@]}")
  : >"$logs/sanitizers.failed"
  sanitizer_cases >"$logs/sanitizers.cases"
  for tool in "${chosen[@]}"; do
    while read -r name program filter; do
      for word in "${wanted[@]:-}"; do
        [[ $name == *"$word"* ]] || continue
        while [ "$(jobs -rp | wc -l)" -ge "${SANITIZER_JOBS:-4}" ]; do sleep 0.1; done
        sanitize_case "$sanitizer" "$tool" "$name" "$program" "$filter" &
        count=$((count + 1))
        break
      done
    done <"$logs/sanitizers.cases"
  done
  wait
  [ "$count" -gt 0 ] || { echo "no case has a name like ${wanted[*]}" >&2; exit 2; }
  printf '%d runs, %d without a clean end; logs in %s\n' \
    "$count" "$(wc -l <"$logs/sanitizers.failed")" "$logs"
  [ ! -s "$logs/sanitizers.failed" ] || failed=1
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
