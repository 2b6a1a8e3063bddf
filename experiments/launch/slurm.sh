#!/usr/bin/env bash
# One training run on Slurm: a process for each GPU, all started with the same command.
#
#   CONFIG=configs/imagenet_mobilevit_v2.py:width=1.0 WORKDIR=/shared/runs/v2 sbatch experiments/launch/slurm.sh
#
# Arguments behind the script's name go to launch.py: … slurm.sh --config.data.root=/shared/imagenet.
# WORKDIR must lie where every node sees it. The processes find one another by what srun tells them.
#
#SBATCH --job-name=mobilevit_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Five minutes before the time is up, each process saves and leaves with 143; then the job queues
# again, and goes on from there. --open-mode keeps the log of the starts before.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

: "${CONFIG:?CONFIG=configs/…}" "${WORKDIR:?WORKDIR=a directory that all nodes share}"
cd "${SLURM_SUBMIT_DIR:?this is for sbatch}"

# srun passes the signal to the processes. Backgrounded, so that this shell sees to it meanwhile.
srun --kill-on-bad-exit=1 --cpu-bind=cores \
    .venv/bin/python launch.py train --config="$CONFIG" --workdir="$WORKDIR" \
    --config.loader.threads="$SLURM_CPUS_PER_TASK" "$@" &
step=$!
trap 'wait "$step"' USR1 TERM
wait "$step"
status=$?

if [ "$status" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
