#!/usr/bin/env bash
# An interactive allocation with a shell on its first node, to try things out before a long job is submitted.
#
#   bash slurm/interactive.sh [options of salloc]      e.g. --nodes=2 --partition=debug --account=mine
#
# Default: one node with its 8 GPUs for an hour; options given here count over those. In the shell:
#   .venv/bin/pi-dist doctor                                                          what this node has
#   bash launch/torchrun.sh gpu launch/configs/small.yaml --parallel.sp_degree=8      train on this node
#   srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" nvidia-smi -L     on every node
# (The shell is a step with one task, which is what srun would start, and wait for what the shell holds.)
# Over several nodes, start one torchrun on each, as slurm/train.sbatch does. Whether their ranks see each other, and how
# fast neighbours do:
#   srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpu-bind=none \
#       .venv/bin/python -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=8 \
#       --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-$RANDOM" \
#       --rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))" \
#       -m pi_dist doctor
set -euo pipefail

command -v salloc >/dev/null || { echo "slurm/interactive.sh: no salloc on PATH: run it on a login node" >&2; exit 2; }
options=(--job-name=pi-dist-shell --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --mem=0 --time=1:00:00)
exec salloc "${options[@]}" "$@" srun --nodes=1 --ntasks=1 --cpu-bind=none --pty "${SHELL:-/bin/bash}" -l
