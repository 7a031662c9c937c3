#!/usr/bin/env bash
# run_gpu_tests.sh --sanitizers with a compute-sanitizer and tests that are made up: what each end of
# a run is called, and the exit code.
set -euo pipefail
source_dir=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bundle/bin" "$work/path"
cp "$source_dir/tools/run_gpu_tests.sh" "$work/bundle"
export STAGECOACH_SOURCE_DIR=$source_dir PATH=$work/path:$PATH
failures=0

cat >"$work/bundle/bin/cuda_conformance_test" <<'LIST'
#!/bin/sh
printf 'Running main() from gtest_main.cc\nSmall/CudaSmallShapes.\n'
printf '  Pass/%s  # GetParam() = 4-byte object\n' Clean Racy Slow Absent Empty Broken
LIST
cp "$work/bundle/bin/cuda_conformance_test" "$work/bundle/bin/cuda_attention_test"
cp "$work/bundle/bin/cuda_conformance_test" "$work/bundle/bin/cuda_head_test"
cp "$work/bundle/bin/cuda_conformance_test" "$work/bundle/bin/cuda_residual_test"
cat >"$work/path/compute-sanitizer" <<'FAKE'
#!/bin/bash
clean() { printf '[  PASSED  ] %s\n========= ERROR SUMMARY: 0 errors\n' "$1"; }
case "${*: -1}" in
  *Racy) printf '[  PASSED  ] 1 test.\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)\n'; exit 9 ;;
  *Slow) echo 'still in a kernel'; exec sleep 30 ;;
  *Absent) printf 'a_test.cc:1: Skipped\nno GPU is visible\n'; clean '0 tests.' ;;
  *Empty) ;;
  *Broken) echo 'Segmentation fault'; exit 139 ;;
  *) clean '1 test.' ;;
esac
FAKE
chmod +x "$work"/bundle/bin/* "$work/path/compute-sanitizer"

expect() {  # exit-code pattern... -- argument...
  local wanted=$1 code=0 patterns=() pattern
  shift
  while [ "$1" != -- ]; do patterns+=("$1"); shift; done
  shift
  SANITIZER_SECONDS=1 "$work/bundle/run_gpu_tests.sh" --sanitizers "$@" >"$work/out" 2>&1 || code=$?
  for pattern in "${patterns[@]}"; do
    grep -qE "$pattern" "$work/out" || { echo "no line like '$pattern' for: $*"; failures=1; }
  done
  [ "$code" = "$wanted" ] || { echo "exit code $code, not $wanted, for: $*"; failures=1; }
  [ "$failures" = 0 ] || cat "$work/out"
}

expect 0 '^ok +racecheck Clean .*ERROR SUMMARY: 0 errors' '^1 runs, 0 without' -- racecheck Clean
expect 0 '^ok +initcheck Residual ' '^ok +memcheck TopLogits ' '^4 runs' -- \
  memcheck initcheck Residual TopLogits
expect 0 '^SKIPPED +racecheck Absent .*no GPU is visible' -- racecheck Absent
expect 1 '^FINDINGS +racecheck Racy .*2 hazards' '^1 runs, 1 without' -- racecheck Racy
expect 1 '^TIMED OUT +synccheck Slow .*still in a kernel' -- synccheck Slow
expect 1 '^FAILED +racecheck Empty .*no test ran' -- racecheck Empty
expect 1 '^FAILED \(139\) +racecheck Broken ' -- racecheck Broken
expect 1 '^ok +racecheck Clean' '^11 runs, 4 without' -- racecheck
expect 2 'no case has a name like Nothing' -- racecheck Nothing
exit "$failures"
