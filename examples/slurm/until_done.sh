# shellcheck shell=bash
# What all jobs in this folder share; sourced by them. A job trains, hands Slurm's warning on to the ranks, waits for
# their checkpoint, and runs again if status.json says that there is something left. docs/clusters.md explains it.
#
#   CODE=...         the folder of the project that is used: it holds pretrain_llama_mer.py
#   OUTPUT_DIR=...   the run's output_dir
#   ARGUMENTS=(...)  of pretrain_llama_mer.py; the command holds them too
#   RANKS=...        how many ranks the command starts
#   SUBMISSION=...   a name that stays over all restarts and jobs of a chain; default: the job's id
#   CHAIN=...        a file with the ids of a chain's jobs: the next one goes on where this one ends; default: requeue
#   MAX_RESTARTS=... restarts in a row that may gain no step; default: 3
#   train_until_done COMMAND...     the command starts the ranks in a step of its own, by srun

say() { echo "$(date '+%Y-%m-%d %H:%M:%S') job $SLURM_JOB_ID on $(hostname): $*"; }

# shellcheck disable=SC2153
refused() {
    # Here, as launchers hide the program's exit code 2. A dry run takes a second and imports no torch.
    local code=0
    python "$CODE/pretrain_llama_mer.py" "${ARGUMENTS[@]}" --dry-run --ranks "$RANKS" >/dev/null || code=$?
    [ "$code" = 2 ]
}

ask() { python "$CODE/tools/requeue.py" "$@"; }

job_end_time() {
    # Not every Slurm tells a job when it ends (22.05 does not). Empty where there is no limit.
    local end
    end=$(scontrol show job -o "$SLURM_JOB_ID" | grep -oE ' EndTime=[^ ]+' | cut -d= -f2) || return 0
    date -d "$end" +%s 2>/dev/null || true
}

time_is_up() { [ -n "$SLURM_JOB_END_TIME" ] && [ "$(date +%s)" -ge "$SLURM_JOB_END_TIME" ]; }

hand_on_warning() {
    # Not to a process that is known here: whatever started the ranks, they are the job's steps.
    say "Slurm's warning: the ranks are asked for a checkpoint"
    scancel --signal=USR1 "$SLURM_JOB_ID"
}

train_until_done() {
    local code=0
    terminated=0
    trap hand_on_warning USR1
    trap 'terminated=1' TERM
    ask begin "$OUTPUT_DIR" --submission "${SUBMISSION:-$SLURM_JOB_ID}" || end_job "$?" 0
    say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"
    if refused; then
        ask end "$OUTPUT_DIR" --refused || end_job "$?" 2
    fi
    # The ranks read it: they write their last checkpoint in time without a signal, too.
    export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(job_end_time)}
    "$@" &
    # A signal ends `wait`, not the command.
    wait "$!" || code=$?
    while kill -0 "$!" 2>/dev/null; do
        code=0
        wait "$!" || code=$?
    done
    trap '' USR1
    say "training ended with exit code $code"
    if [ "$terminated" = 1 ] && ! time_is_up; then
        say "ended from outside: after pre-emption or a node's failure Slurm requeues the job itself, after scancel nobody does"
        exit 143
    fi
    if ! still_ours; then
        say "Slurm has begun this job anew elsewhere, or does not answer: nothing is decided here"
        exit 1
    fi
    ask end "$OUTPUT_DIR" --exit-code "$code" --max-restarts "${MAX_RESTARTS:-3}" || end_job "$?" "$code"
    run_again
}

still_ours() {
    # A node that was cut off comes here too, when Slurm has long begun the job elsewhere.
    local known=""
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        known=$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null) && break
        sleep 30
    done
    [[ $known == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

end_job() {
    # 3: there is nothing left to do, which is a success.
    if [ "$1" = 3 ]; then exit 0; fi
    exit "$(($2 ? $2 : 1))"
}

run_again() {
    local bad
    bad=$(ask bad-nodes "$OUTPUT_DIR")
    if [ -n "${CHAIN:-}" ]; then
        say "the next job of the chain goes on; after the last one submit again"
        [ -z "$bad" ] || while read -r job; do exclude "$job" "$bad" || true; done <"$CHAIN"
        exit 0
    fi
    # From here on Slurm ends this script with TERM, and all that it starts.
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID"
    # Only a job that waits can be told which nodes to leave out.
    [ -z "$bad" ] || for _ in 1 2 3 4 5; do
        exclude "$SLURM_JOB_ID" "$bad" && break
        sleep 0.5
    done
    exit 0
}

exclude() {
    local now
    now=$(scontrol show job -o "$1" 2>/dev/null | grep -oE ' ExcNodeList=[^ ]+' | cut -d= -f2) || return 1
    [ "$now" != "(null)" ] || now=""
    scontrol update JobId="$1" ExcNodeList="${now:+$now,}$2" 2>/dev/null && say "job $1 leaves out $2"
}
