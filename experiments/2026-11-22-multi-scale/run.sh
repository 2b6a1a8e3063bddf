#!/usr/bin/env bash
# Makes this record again: bash experiments/2026-11-22-multi-scale/run.sh DIRECTORY
# Two runs on as many images, one with 28 pixels, one with 20 to 36; each is evaluated at three sizes.
set -euo pipefail
OUT=${1:?where to}
SAME=(--config=configs/fashion_mnist.py --config.duration="0.5 epochs" --config.eval.every="0.25 epochs"
    --config.schedule.warmup="20 steps" --config.model.width=0.25 "--config.model.strides=(2,2,1,2,1,1)"
    --config.ema_decay=0.98 --config.log.every="20 steps" --config.eval.batch_size=1000
    "--config.augment={'name': 'random_resized_crop', 'scale': (0.5, 1.0), 'ratio': (0.75, 1.3333), 'resize': 'fast_aa', 'flip': True}")
python launch.py train "${SAME[@]}" --workdir="$OUT/fixed"
python launch.py train "${SAME[@]}" --workdir="$OUT/multi-scale" --config.multiscale="{'name': 'variable_batch', 'low': 20, 'high': 36, 'divisor': 4, 'replicas': 1}"
for size in 20 28 36; do
    for run in fixed multi-scale; do
        echo "$run at $size: $(python launch.py eval "$OUT/$run" --json --config.input.size="($size,$size)" --config.input.resize=$size)"
    done
done | tee "$OUT/evaluations.txt"
python "$(dirname "$0")/draw.py" "$OUT"
