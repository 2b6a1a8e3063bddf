#!/usr/bin/env bash
# A sweep on Slurm: one worker an accelerator, the first of them makes the study.
#
#   export OPTUNA_STORAGE=postgresql://sweeper@db.example.org/optuna     # password: ~/.pgpass
#   sbatch experiments/launch/sweep_slurm.sh --config=configs/fashion_mnist.py --workdir=$PWD/sweeps/fashion --trials=100
#
# Without OPTUNA_STORAGE the study is a journal in --workdir, which all nodes must share. More
# workers at any time: sbatch --array=1-8 ... with the same arguments. Slurm sends SIGUSR1 two
# minutes before the time is over: the trials save, and the same sbatch goes on with them.
#SBATCH --job-name=sweep
#SBATCH --array=0-7
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --output=slurm-%x-%A_%a.out
set -euo pipefail

for argument in "$@"; do
    case $argument in --workdir=*) workdir=${argument#--workdir=} ;; esac
done
: "${workdir:?give --workdir=DIR}"
mkdir -p "$(dirname "$workdir")"
workdir=$(cd "$(dirname "$workdir")" && pwd)/$(basename "$workdir")
study=$(basename "$workdir")
export OPTUNA_STORAGE=${OPTUNA_STORAGE:-journal://$workdir/study.journal}
python=${PYTHON:-.venv/bin/python}

# srun passes the signal on to the worker; exec would leave nobody to wait for it.
if [ "${SLURM_ARRAY_TASK_ID:-0}" = 0 ]; then
    srun "$python" launch.py sweep "$@" --workers=1 && exit 0 || status=$?
else
    # Status 2 until the study is there.
    for _ in $(seq 60); do
        srun "$python" launch.py sweep --worker --study="$study" --workdir="$workdir" --workers=1 && exit 0 || status=$?
        [ "$status" = 2 ] || break
        sleep 10
    done
fi
# 143: interrupted and saved.
if [ "$status" = 143 ] && [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
