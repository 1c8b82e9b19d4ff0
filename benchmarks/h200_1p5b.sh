#!/usr/bin/env bash
# Hymba-1.5B on one GPU in the real training loop, BF16, sequence 2048, one optimizer step per micro-batch.
# Before it: GPU tests. Results under $OUT. Needs build/bench-data (make bench-data) and the GPU packages.
# BATCHES="4 8" STEPS=25 TESTS="tests/ops tests/gpu" OVERRIDES="..." are what it takes from the environment.
set -u
OUT=${OUT:-build/bench-results}
STEPS=${STEPS:-25}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
if [ -n "${TESTS-tests/ops tests/gpu}" ]; then
  timeout 240 python3 -m pytest -q -p no:cacheprovider -m gpu ${TESTS-tests/ops tests/gpu} >"$OUT/gpu_tests.log" 2>&1
  echo "GPU tests: exit code $?"; grep -E "^(FAILED|ERROR)|passed|failed" "$OUT/gpu_tests.log" | tail -30
fi
for batch in ${BATCHES:-4 8}; do
  rm -rf "runs/b$batch"
  timeout 150 python3 -m hymba_train train experiment=bench_1p5b "run.name=b$batch" "run.train_steps=$STEPS" \
    "data.phases.bench.micro_batch_size=$batch" "data.phases.bench.global_batch_size=$batch" \
    "logging.profile=$((STEPS - 1)):$STEPS" ${OVERRIDES:-} >"$OUT/b$batch.log" 2>&1
  echo "micro-batch $batch: exit code $?"; tail -6 "$OUT/b$batch.log"
  cp "runs/b$batch/metrics.jsonl" "$OUT/b$batch.jsonl" 2>/dev/null
  cp runs/b"$batch"/profile/*.txt "$OUT/b$batch.profile.txt" 2>/dev/null
  cat runs/b"$batch"/profile/*.parts.json | tr -d '\n'; echo
done
