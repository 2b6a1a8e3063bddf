#!/usr/bin/env bash
# A sweep on GKE through xpk: as many one-host slices as workers, on one database.
#
#   CLUSTER=my-cluster ZONE=us-central2-b PROJECT=my-project TPU=v5litepod-1 WORKERS=16 IMAGE=gcr.io/my-project/mobilevit_jax \
#   OPTUNA_STORAGE=postgresql://sweeper:PASSWORD@10.0.0.3/optuna \
#   experiments/launch/sweep_xpk.sh --config=configs/imagenet_mobilevit_v2.py:width=0.5 --workdir=/gcs/sweeps/v2 --trials=64
#
# The image holds this repository in its working directory. The study is made from here, so this
# machine must reach the database and the data; then it leaves, and the workers go on without it.
# --workdir must mean the same place on all slices if a trial is to go on with the checkpoints of a
# worker that died. Afterwards, or to follow it: the same launch.py sweep command, from anywhere.
set -euo pipefail
: "${CLUSTER:?}" "${ZONE:?}" "${PROJECT:?}" "${TPU:?}" "${WORKERS:?}" "${IMAGE:?}" "${OPTUNA_STORAGE:?}"

for argument in "$@"; do
    case $argument in --workdir=*) workdir=${argument#--workdir=} ;; esac
done
: "${workdir:?give --workdir=DIR}"
study=$(basename "$workdir")
python=${PYTHON:-.venv/bin/python}

"$python" launch.py sweep "$@" --executor=none
# The password goes as an environment variable of the workload, not on a command line in it.
xpk workload create --workload="sweep-$study" --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
    --tpu-type="$TPU" --num-slices="$WORKERS" --docker-image="$IMAGE" --max-restarts=10 \
    --termination-grace-period-seconds=300 \
    --env="OPTUNA_STORAGE=$OPTUNA_STORAGE" \
    --command="exec python launch.py sweep --worker --study=$study --workdir=$workdir --workers=1"
