#!/bin/bash
# CLIPTeX on 8 machines of 8 A100, 4096 pairs a step: sbatch train/slurm_8x8_a100.sh RECIPE LABELLED_SHARDS [OPTION]…
#
#   sbatch train/slurm_8x8_a100.sh cliptex_vitb16_cc3m /scratch/cc3m-labelled --register cliptex-vitb16
#   sbatch train/slurm_8x8_a100.sh clip-ft_vitb16_cc3m /scratch/cc3m-labelled --register clip-ft-vitb16
#
# The same without a script: clipbench train RECIPE --data DIR --launcher slurm --nodes 8 --nproc 8 --slurm …
# Ten minutes before the time limit Slurm asks the run to stop, and it has as long to end its step and save before it is
# killed (`SAVING` in clipbench/probing/launch.py). Then the job is queued again and goes on.
#SBATCH --job-name=cliptex
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@600
#SBATCH --output=slurm-%x-%j.log

set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: sbatch $0 RECIPE LABELLED_SHARDS [OPTION]…" >&2
    exit 2
fi
recipe=$1 data=$2
shift 2

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((29500 + SLURM_JOB_ID % 1000))
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

# One launcher a machine, which starts a process a GPU. --resume starts from the beginning where there is no checkpoint.
# srun does not take --cpus-per-task over from sbatch (since Slurm 22.05).
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" clipbench train "$recipe" --data "$data" \
    --launcher torchrun --nodes "$SLURM_NNODES" --nproc 8 --resume "$@" &
run=$!
stopped=0
trap 'stopped=1; kill -TERM "$run"' TERM
status=0
wait "$run" || status=$?
if [ "$stopped" = 1 ]; then
    status=0
    wait "$run" || status=$? # the first wait ended with the signal; the run is still saving
    case "$status" in
        0) exit 0 ;;
        130 | 143) scontrol requeue "$SLURM_JOB_ID" && exit 0 ;; # stopped and saved
    esac
fi
exit "$status"
