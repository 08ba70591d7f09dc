#!/bin/bash
# Train on several machines under Slurm, beyond the time limit of a job: five minutes before the limit
# the run saves a checkpoint, stops and is queued again; it resumes bit-exactly.
# Run from the root of the repository, after `make setup`:
#   sbatch training/slurm.sh --config training/recipes/cifar10.yaml --output-dir runs/cifar10
#SBATCH --job-name=ddpm-hf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} ACCELERATE_MIXED_PRECISION=bf16

# Slurm starts one process per GPU without a launcher: torchrun would kill the processes 30 seconds
# after the signal, even while they save. If a process dies, the others end a minute later.
srun --wait=60 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec .venv/bin/python training/train.py "$@"' train "$@" &
run=$!

requeue=no
# Not to srun, which would kill the processes at this signal.
trap 'requeue=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1
# A trapped signal ends `wait` while the processes are still saving.
status=0
until wait "$run" && status=0; do
  status=$?
  kill -0 "$run" 2>/dev/null || break
done
if [ "$requeue" = yes ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
