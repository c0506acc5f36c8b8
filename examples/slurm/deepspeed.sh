#!/usr/bin/env bash
# `deepspeed --launcher slurm` on all nodes of the job: deepspeed.sh RANKS_PER_NODE SCRIPT ARGUMENTS...
# It needs a file of hosts, made here, and places ranks as Slurm likes unless srun is told how many a node takes.
set -eu

per_node=$1
shift
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
hostfile=$(mktemp)
trap 'rm -f "$hostfile"' EXIT
awk -v slots="$per_node" '{ print $0 " slots=" slots }' <<<"$hosts" >"$hostfile"

deepspeed --hostfile "$hostfile" --launcher slurm --force_multi --no_ssh_check --master_addr "$(head -n 1 <<<"$hosts")" \
    --launcher_args "--nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=$per_node --kill-on-bad-exit=1" "$@"
