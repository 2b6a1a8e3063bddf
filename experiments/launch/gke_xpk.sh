#!/usr/bin/env bash
# One training run on TPU slices (or GPU nodes) of a GKE cluster, through xpk: `pip install xpk`.
#
#   CLUSTER=my-cluster ZONE=us-central2-b PROJECT=my-project IMAGE=gcr.io/my-project/mobilevit_jax \
#   CONFIG=configs/imagenet_mobilevit_v2.py:width=1.0 WORKDIR=/data/runs/v2 \
#   experiments/launch/gke_xpk.sh --config.data.root=/data/imagenet
#
# IMAGE holds this repository in its working directory, with `pip install '.[tpu]'` (or '[cuda]').
# WORKDIR must lie where every host sees it: a Cloud Storage FUSE or Filestore volume of the cluster
# (`xpk storage attach`). xpk starts the same command on every host, the processes find one another.
# A slice that is taken away gets SIGTERM: the run saves and leaves with 143. With --max-restarts
# GKE starts it again, and it goes on from there.
set -euo pipefail

: "${CLUSTER:?}" "${ZONE:?}" "${PROJECT:?}" "${IMAGE:?}" "${CONFIG:?}" "${WORKDIR:?}"
NAME=${NAME:-mobilevit-jax-$(date +%m%d-%H%M)}
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
SLICES=${SLICES:-1}

printf -v more ' %q' "$@"
xpk workload create \
    --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
    --workload="$NAME" --docker-image="$IMAGE" \
    --tpu-type="$TPU_TYPE" --num-slices="$SLICES" \
    --max-restarts=100 --termination-grace-period-seconds=300 \
    --command="exec python launch.py train --config=$CONFIG --workdir=$WORKDIR$more"
