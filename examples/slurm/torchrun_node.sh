#!/usr/bin/env bash
# One task of srun a node: torchrun with what follows, as node SLURM_NODEID of the step. torchrun hands USR1 on to
# nobody and dies of it, so it is made deaf to it, and this script tells the ranks, which are its children.
set -eu

master=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
trap '' USR1
torchrun --nnodes "$SLURM_STEP_NUM_NODES" --node-rank "$SLURM_NODEID" --max-restarts 0 \
    --master-addr "$master" --master-port "$((10000 + SLURM_JOB_ID % 20000))" "$@" &
trap 'pkill -USR1 --parent "$!"' USR1

code=0
wait "$!" || code=$?
while kill -0 "$!" 2>/dev/null; do
    code=0
    wait "$!" || code=$?
done
exit "$code"
