#!/usr/bin/env bash
#SBATCH --job-name=nanomath
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# One process per GPU, started by srun: sbatch runs/slurm.sh train_grpo.py --init runs/sft ...
# Five minutes before the time limit every process gets SIGUSR1, saves after its step and exits 0;
# the job then queues again, and the same command continues the run.
set -euo pipefail
if [[ $# == 0 || "$1" == -h || "$1" == --help || -z "${SLURM_JOB_ID:-}" ]]; then
    sed -n '/^#!/d; /^#SBATCH/d; /^#/!q; s/^# //p' "$0"
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
export MASTER_PORT=29500
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR

requeue=no
trap 'requeue=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # to the steps, not to this shell

# shellcheck disable=SC2016 # each task expands its own variables
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID \
    WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec python "$@"' task "$@" &
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do # the trap has interrupted the wait
    status=0
    wait $! || status=$?
done
if [ "$requeue" = yes ] && [ "$status" = 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
