#!/usr/bin/env bash
# One task of srun a node: torchrun with what follows, as node SLURM_NODEID of the step. torchrun hands USR1 on to
# nobody and dies of it, so it is made deaf to it, and this script tells the ranks, which are its children.
set -eu

master=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
warned=0
trap 'warned=1' USR1
(
    trap '' USR1
    exec torchrun --nnodes "$SLURM_STEP_NUM_NODES" --node-rank "$SLURM_NODEID" --max-restarts 0 \
        --master-addr "$master" --master-port "$((10000 + SLURM_JOB_ID % 20000))" "$@"
) &

while kill -0 "$!" 2>/dev/null; do
    # There may be no ranks yet.
    if [ "$warned" = 1 ] && pkill -USR1 --parent "$!"; then warned=0; fi
    sleep 1 || true # a signal to the step ends it too
done
wait "$!"
