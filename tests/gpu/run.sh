#!/usr/bin/env bash
# Runs the GPU tests where there is a GPU but maybe no Rust: `tests/gpu/run.sh TEST_BINARY OUT_DIR [COMMIT]`.
# Build the binary with `cargo test --test gpu --no-run` and nvcc; what it prints goes to OUT_DIR, for docs/measured/.
set -uo pipefail
binary=$1 out=$2 commit=${3:-unknown}
mkdir -p "$out"
failed=0
step() {
  local name=$1 limit=$2
  shift 2
  {
    echo "commit  $commit"
    echo "card    $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"
    echo "command $*"
    echo
  } >"$out/$name.txt"
  local start=$SECONDS
  timeout "$limit" "$@" >>"$out/$name.txt" 2>&1
  local status=$?
  [ $status = 0 ] || failed=1
  echo "== $name: exit $status, $((SECONDS - start)) s" | tee -a "$out/$name.txt"
}
step tests "${LIMIT_TESTS:-600}" "$binary" --test-threads=1
export INDEXCACHE_GPU_SMALL=1
for tool in memcheck racecheck; do
  step "$tool" "${LIMIT_SANITIZER:-600}" \
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$binary" --test-threads=1
done
exit $failed
