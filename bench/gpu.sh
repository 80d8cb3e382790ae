#!/usr/bin/env bash
# For a machine with an NVIDIA GPU: builds with CUDA, runs the whole test suite and then every op's
# tests on the GPU, trains there, times every op beside cuBLAS and torch, and writes one report.
#
#   bash bench/gpu.sh [FOLDER]             by default build/gpu; FOLDER/report.md is what to send
#   bash bench/gpu.sh --dry-run [FOLDER]   small cases on the CUDA emulator, to try the script itself:
#                                          after `cmake --preset emulated && cmake --build --preset emulated`,
#                                          with a python that has what the emulator's tests need
#
# A torch that `python3` finds is timed too. Exit status 1 if anything failed; the report says what.
set -uo pipefail
cd "$(dirname "$0")/.."
dry=
[ "${1:-}" = --dry-run ] && dry=yes && shift
folder=${1:-build/gpu}
mkdir -p "$folder"
report=$folder/report.md
failed=0

section() { # section NAME COMMAND…: runs it, its output to a file, its last lines into the report
  local name=$1 file=$folder/${1// /-}.txt lines=${lines:-4} start=$SECONDS state=passed
  shift
  echo "== $name" >&2
  "$@" >"$file" 2>&1 </dev/null || { state=FAILED failed=1 lines=40; }
  printf '\n## %s: %s, %d s\n\n```\n%s\n```\n' "$name" "$state" $((SECONDS - start)) "$(tail -n "$lines" "$file")" >>"$report"
}

build() {
  python3 -m venv --system-site-packages "$folder/venv" &&
    TILEWRIGHT_CUDA=ON "$folder/venv/bin/pip" install '.[test]' 'cupy-cuda13x[ctk]>=14'
}

generic=tests/test_{forward,backward,errors,determinism,nonfinite}.py
generic=$(eval echo "$generic")
if [ -n "$dry" ]; then
  python=python
  TILEWRIGHT_EMULATED=$(echo "$PWD"/build/emulated/_emulated_fast.*.so)
  export TILEWRIGHT_EMULATED PYTHONPATH=$PWD/python
  printf '# tilewright on emulated CUDA: a dry run\n\n**No GPU. Nothing here is measured.**\n' >"$report"
else
  python=$folder/venv/bin/python
  printf '# tilewright on a GPU\n\n%s, commit %s\n' "$(date -u +%F)" "$(git rev-parse --short HEAD)" >"$report"
  lines=30 section "the card" nvidia-smi
  section "build" build
  section "tests on the CPU" "$python" -m pytest -q tests
fi
export TILEWRIGHT_TEST_DEVICE=cuda
# shellcheck disable=SC2086  # a list of files
section "tests on the GPU" "$python" -m pytest -q -p no:cacheprovider $generic ${dry:+-k 'softmax and (matches or layout)'}
unset TILEWRIGHT_TEST_DEVICE
if [ -z "$dry" ]; then
  section "training on the GPU" "$python" -m tilewright train README.md --device cuda --steps 100 --out "$folder/gpt"
fi
echo "== times" >&2
{
  printf '\n## Times\n\n'
  "$python" bench/gpu.py --json "$folder/times.json"
} >>"$report" || failed=1
echo "$report" >&2
exit $failed
