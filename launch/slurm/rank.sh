#!/usr/bin/env bash
# One rank: srun starts this once a GPU. Slurm's names become torch's; every rank sees all GPUs of its node.
set -u
# A rank is told to stop more than once (scancel tells all processes, supervise.sh repeats itself): what its own handler
# falls back to after the first time must not kill it while it saves.
trap '' USR1 TERM INT
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$GPUS
exec python -u "$@"
