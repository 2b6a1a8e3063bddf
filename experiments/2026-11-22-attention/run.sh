#!/usr/bin/env bash
# Makes this record again: bash experiments/2026-11-22-attention/run.sh DIRECTORY
set -euo pipefail
OUT=${1:?where to}
python launch.py sweep --config=configs/fashion_mnist.py --workdir="$OUT/sweep" \
    --sampler=grid --pruner=none --space.model.attention=choice:separable,multihead,linformer \
    --config.duration="0.5 epochs" --config.eval.every="0.25 epochs" --config.schedule.warmup="20 steps" \
    --config.model.width=0.25 --config.model.latents=16 "--config.model.strides=(2,2,1,2,1,1)" \
    --config.ema_decay=0.98 --config.log.every="20 steps" --config.eval.batch_size=1000
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/attention.py --tokens=65536 --out "$OUT"
