#!/usr/bin/env bash
# Everything that needs a GPU, in one go and in less than 8 minutes, from a bare checkout: tests marked `gpu`, then the
# benchmarks. Packages that the machine lacks may be on PYTHONPATH; in a copy without git, COMMIT says what it is a copy
# of. Results become one file, benchmarks/results/gpu_DEVICE.json, which is copied to $OUT where that is set.
#
#   bash benchmarks/gpu.sh [--dry-run]
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
dry_run=$([ "${1:-}" = --dry-run ] && echo yes || echo no)
work=${OUT:-benchmarks/results}/parts
status=0 total=0 outcomes=""

# part NAME SECONDS COMMAND...: runs it for at most so long, shows and keeps what it prints, remembers how it ended.
part() {
  local name=$1 seconds=$2 begun=$SECONDS code=0
  shift 2
  total=$((total + seconds))
  echo "== $name, at most $seconds s: $*"
  [ "$dry_run" = yes ] && return
  timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$work/$name.log" || code=$?
  [ "$code" = 124 ] && echo "== $name ran out of its $seconds s; what it had written by then counts"
  [ "$code" = 0 ] || status=1
  outcomes="$outcomes${outcomes:+, }\"$name\": \"exit $code after $((SECONDS - begun)) s\""
}

# absent NAME WHY: a part that cannot run is said to be missing, not passed over.
absent() {
  echo "== $1 DID NOT RUN: $2"
  status=1
  outcomes="$outcomes${outcomes:+, }\"$1\": \"did not run: $2\""
}

gpu_tests() {
  grep -rlE 'mark\.gpu' tests --include='test_*.py' | sort | tr '\n' ' '
}

if [ "$dry_run" = no ]; then
  "$python" -c 'import torch; assert torch.cuda.is_available(), "this needs a CUDA device"' || exit 1
  mkdir -p "$work"
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit --format=csv
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
fi

if "$python" -c 'import pytest' 2>/dev/null; then
  # shellcheck disable=SC2046  # one argument a file
  part tests 100 "$python" -m pytest -q --maxfail=20 -p no:cacheprovider -m gpu $(gpu_tests)
else
  absent tests "pytest is not installed; put it on PYTHONPATH"
fi
part loss 195 "$python" -m benchmarks.loss --rounds 30 --budget-s 175 --out "$work"
part overlap 60 "$python" -m benchmarks.overlap --rounds 10 --budget-s 45 --out "$work"
part step 75 "$python" -m benchmarks.step --rounds 10 --budget-s 65 --speeds causal causal+compile --no-compiled-peer --out "$work"
for bench in kernels/*/bench.py; do
  kernel=$(basename "$(dirname "$bench")")
  part "$kernel" 12 "$python" -m "pretrain.kernels.$kernel.bench"
  [ "$dry_run" = yes ] || cp "$work/$kernel.log" "$work/$kernel.table"
done
echo "== at most $total s in all"
[ "$dry_run" = yes ] && exit 0

echo "{$outcomes}" >"$work/outcomes.json"
"$python" -m benchmarks.merge "$work" benchmarks/results || status=1
if [ -n "${OUT:-}" ]; then
  cp benchmarks/results/gpu_*.json "$OUT"/
  tar -czf "$OUT/parts.tar.gz" -C "$OUT" parts
fi
rm -r "$work"
exit $status
