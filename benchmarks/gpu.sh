#!/usr/bin/env bash
# Everything that needs a GPU, in one go, from a bare checkout: tests marked `gpu`, then the benchmarks. Packages that the
# machine lacks may be on PYTHONPATH. Results go to benchmarks/results/, and to $OUT where that is set.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
"$python" -c 'import torch; assert torch.cuda.is_available(), "this needs a CUDA device"' || exit 1
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv
status=0
"$python" -m pytest -q -m gpu tests || status=1
"$python" -m benchmarks.loss || status=1
"$python" -m benchmarks.step || status=1
[ -n "${OUT:-}" ] && cp benchmarks/results/*.json "$OUT"/
exit $status
