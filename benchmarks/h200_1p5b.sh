#!/usr/bin/env bash
# Hymba-1.5B on one GPU in the real training loop, BF16, sequence 2048, one optimizer step per micro-batch.
# Before it: GPU tests. Results under $OUT. Needs build/bench-data (make bench-data) and the GPU packages.
set -u
OUT=${OUT:-build/bench-results}
STEPS=${STEPS:-25}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
timeout 280 python3 -m pytest -q -p no:cacheprovider -m gpu tests/ops tests/gpu >"$OUT/gpu_tests.log" 2>&1
echo "GPU tests: exit code $?"; tail -5 "$OUT/gpu_tests.log"
for batch in 4 8; do
  timeout 130 python3 -m hymba_train train experiment=bench_1p5b "run.name=b$batch" "run.train_steps=$STEPS" \
    "data.phases.bench.micro_batch_size=$batch" "data.phases.bench.global_batch_size=$batch" >"$OUT/b$batch.log" 2>&1
  echo "micro-batch $batch: exit code $?"; tail -3 "$OUT/b$batch.log"
  cp "runs/b$batch/metrics.jsonl" "$OUT/b$batch.jsonl" 2>/dev/null
done
