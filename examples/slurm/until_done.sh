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
#   MAX_RESTARTS=... restarts in a row that may gain no step; default: launch.max_restarts_without_step of the run
#   PYTHON=(...)     what runs Python, such as (apptainer exec --nv image.sif python); default: python
#   train_until_done COMMAND...     the command starts the ranks in a step of its own, by srun

[[ $(declare -p PYTHON 2>/dev/null) == "declare -a"* ]] || PYTHON=(python)

# What the shell that submitted had set, and srun would take for its own options. Its environment is the job's.
export SLURM_EXPORT_ENV=ALL
unset "${!SLURM_CPU_BIND@}"
memory=("${!SLURM_MEM_PER_@}")
# The job's own is one of them. Of several srun takes none, and without any it takes what the job has.
[ "${#memory[@]}" -lt 2 ] || unset "${memory[@]}"

say() { echo "$(date '+%Y-%m-%d %H:%M:%S') job $SLURM_JOB_ID on $(hostname): $*"; }

# shellcheck disable=SC2153
refused() {
    # Here, as launchers hide the program's exit code 2. A dry run takes a second and imports no torch.
    local code=0
    "${PYTHON[@]}" "$CODE/pretrain_llama_mer.py" "${ARGUMENTS[@]}" --dry-run --ranks "$RANKS" >/dev/null || code=$?
    [ "$code" = 2 ]
}

ask() {
    local question=$1
    shift
    "${PYTHON[@]}" "$CODE/tools/requeue.py" "$question" "$OUTPUT_DIR" "$@"
}

patiently() {
    # A controller that is busy, or just being replaced, answers later.
    for _ in 1 2 3 4 5 6 7 8 9; do
        "$@" && return 0
        sleep 30
    done
    "$@"
}

job_end_time() {
    # Not every Slurm tells a job when it ends (22.05 does not). Empty where there is no limit.
    local end
    end=$(scontrol show job -o "$SLURM_JOB_ID" | grep -oE ' EndTime=[^ ]+' | cut -d= -f2) || return 0
    date -d "$end" +%s 2>/dev/null || true
}

time_is_up() { [ -n "$SLURM_JOB_END_TIME" ] && [ "$(date +%s)" -ge "$SLURM_JOB_END_TIME" ]; }

hand_on_warning() {
    # Not to a process that is known here: whatever started the ranks, they are the job's steps.
    squeue --noheader --steps --jobs "$SLURM_JOB_ID" --format %i 2>/dev/null | grep -qE '\.[0-9]+$' || return 0
    scancel --signal=USR1 "$SLURM_JOB_ID" || { say "Slurm's warning could not be handed on: once more in 5 s"; return 0; }
    [ "$warned" != 1 ] || say "Slurm's warning: the ranks are asked for a checkpoint"
    warned=2
}

run_ranks() {
    # Traps only note what came, as a command that fails in one would end the script. The warning is handed on again and
    # again: a rank that still loads does not hear it.
    local seconds=0
    "$@" &
    while kill -0 "$!" 2>/dev/null; do
        if [ "$warned" != 0 ]; then
            [ "$((seconds % 5))" != 0 ] || hand_on_warning
            seconds=$((seconds + 1))
        fi
        sleep 1
    done
    wait "$!"
}

train_until_done() {
    local code=0 started=1 submission=${SUBMISSION:-$SLURM_JOB_ID}
    terminated=0
    warned=0
    trap 'warned=1' USR1
    trap 'terminated=1' TERM
    ask begin --submission "$submission" || end_job "$?" 0
    say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"
    if refused; then
        ask end --submission "$submission" --refused || end_job "$?" 2
    fi
    # The ranks read it: they write their last checkpoint in time without a signal, too.
    export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(job_end_time)}
    if [ "$terminated" = 1 ] || ! nodes_are_fit; then
        code=1
    elif [ "$warned" = 1 ]; then
        say "Slurm's warning came while the job began: no rank is started"
        started=0
    else
        run_ranks "$@" || code=$?
        say "training ended with exit code $code"
    fi
    trap '' USR1
    if [ "$terminated" = 1 ] && ! time_is_up; then
        say "ended from outside: after pre-emption or a node's failure Slurm requeues the job itself, after scancel nobody does"
        exit 143
    fi
    if ! still_ours; then
        say "Slurm has begun this job anew elsewhere, or does not answer: nothing is decided here"
        exit 1
    fi
    if [ "$started" = 0 ]; then
        ask end --submission "$submission" --not-started || end_job "$?" 1
    else
        ask end --submission "$submission" --exit-code "$code" ${MAX_RESTARTS:+--max-restarts "$MAX_RESTARTS"} || end_job "$?" "$code"
    fi
    run_again
}

nodes_are_fit() {
    # A node that lacks the shared file system fails without a word: it is found here, and left out of the next start.
    local fit node unfit=()
    [ "$SLURM_JOB_NUM_NODES" -gt 1 ] || return 0
    # shellcheck disable=SC2016
    fit=$(timeout -k 10 120 srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=0 \
        bash -c 'test -r "$0/pretrain_llama_mer.py" && trial=$(mktemp "$1/.node_XXXXXX") && rm "$trial" && echo "$SLURMD_NODENAME"' \
        "$CODE" "$OUTPUT_DIR" </dev/null) || true
    # The check was ended with the job, and says nothing of nodes.
    [ "$terminated" = 0 ] || return 1
    if [ -z "$fit" ]; then
        say "nodes could not be checked"
        return 0
    fi
    while read -r node; do
        grep -qxF "$node" <<<"$fit" || unfit+=("$node")
    done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    [ "${#unfit[@]}" != 0 ] || return 0
    say "no rank is started: ${unfit[*]} cannot read $CODE or write into $OUTPUT_DIR, as this node can"
    ask leave-out --nodes "${unfit[@]}" --why "cannot read the code or write into output_dir"
    return 1
}

still_ours() {
    # A node that was cut off comes here too, when Slurm has long begun the job elsewhere.
    local known
    known=$(patiently scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null) || return 1
    [[ $known == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

end_job() {
    # 3: there is nothing left to do, which is a success.
    if [ "$1" = 3 ]; then exit 0; fi
    exit "$(($2 ? $2 : 1))"
}

run_again() {
    local bad
    bad=$(ask bad-nodes) || bad=""
    if [ -n "${CHAIN:-}" ]; then
        say "the next job of the chain goes on; after the last one submit again"
        [ -z "$bad" ] || while read -r job; do exclude "$job" "$bad" || true; done <"$CHAIN"
        exit 0
    fi
    # From here on Slurm ends this script with TERM, and all that it starts.
    trap '' TERM
    if ! patiently scontrol requeue "$SLURM_JOB_ID"; then
        say "Slurm refuses to requeue: submit again, or use --chain"
        exit 1
    fi
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
