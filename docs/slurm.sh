#!/usr/bin/env bash
# A run on several hosts as a Slurm job, submitted from the folder that has .venv:
#   sbatch --nodes=8 docs/slurm.sh --recipe record_089 --data /shared/fineweb10B
# Arguments behind the file are those of `speedrun train`. See docs/many_hosts.md.
#SBATCH --job-name=speedrun
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --output=slurm-%j.txt
set -euo pipefail
PATH="$PWD/.venv/bin:$PATH"

# One task a host: torchrun's agent, which starts a rank for each of the host's GPUs.
ranks=${SLURM_GPUS_ON_NODE:-1}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 10000))  # two jobs of one host need two

# Newer versions of srun don't take --cpus-per-task from the job.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$ranks" \
  --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID" \
  -m speedrun.train "$@"
