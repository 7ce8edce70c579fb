#!/usr/bin/env bash
# Runs a command on the GPUs of SLURM nodes, one process a GPU; out of time, it is stopped, queued again and goes on.
#
#   launch/slurm.sh [OPTION …] -- COMMAND …
#
# Outside of an allocation this submits itself; inside, as in the job that it submits, it runs the command by srun.
#
#   --nodes N            how many nodes (1)
#   --gpus-per-node N    GPUs of each (1)
#   --cpus-per-task N    CPU cores for each GPU's process, if not what the cluster gives
#   --time T             limit of the job, as sbatch takes it
#   --partition P        --account A        --job-name J (deqa)
#   --venv DIR           virtual environment with deqa in it, in a folder that all nodes have
#   --restarts N         how often a job that was stopped is queued again (100)
#   --dry-run            print the command, and run nothing
#
# The output is in JOBNAME-JOBID.log, in the folder that this was run in.
#
# example: launch/slurm.sh --nodes 2 --gpus-per-node 4 --time 24:00:00 --venv .venv -- \
#     deqa train --config_path configs/mix3_lora.yaml --model /shared/mix3 --output /shared/runs/lora

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

nodes=1 gpus_per_node=1 cpus_per_task='' time='' partition='' account='' job_name=deqa venv='' restarts=100

# The srun that runs, and how often it was asked to stop.
step='' signals=0

main() {
    parse "nodes gpus-per-node cpus-per-task time partition account job-name venv restarts" "dry-run" "$@"
    matches nodes '[1-9][0-9]*' "number of at least 1"
    matches gpus-per-node '[1-9][0-9]*' "number of at least 1"
    matches cpus-per-task '[1-9][0-9]*' "number of at least 1"
    matches restarts '[0-9]+' "number"
    needs_job
    [[ -z $venv || -x $venv/bin/python ]] ||
        misuse "--venv $venv has no bin/python: give the folder of a virtual environment"
    [[ -z $venv ]] || venv=$(cd "$venv" && pwd)
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        run_step
    else
        submit
    fi
}

# The job's script is this one at its own place, as SLURM's copy of it would not find common.sh. `exec`, as SIGTERM
# comes to the shell of the job alone.
submit() {
    local self
    needs_tool sbatch "SLURM's commands, or run this where they are"
    self=(bash "$here/${0##*/}" --restarts "$restarts" ${venv:+--venv "$venv"}
        ${cpus_per_task:+--cpus-per-task "$cpus_per_task"} -- "${job[@]}")
    ask sbatch --job-name="$job_name" --nodes="$nodes" --ntasks=$((nodes * gpus_per_node)) \
        --ntasks-per-node="$gpus_per_node" --gpus-per-node="$gpus_per_node" \
        ${cpus_per_task:+--cpus-per-task="$cpus_per_task"} ${time:+--time="$time"} \
        ${partition:+--partition="$partition"} ${account:+--account="$account"} \
        --requeue --signal=B:TERM@120 --open-mode=append --output=%x-%j.log --wrap="exec $(quote "${self[@]}")" ||
        fail "the job was not accepted; sbatch says above why"
}

# JAX has each process take the GPU of its number on the node, so it must see all of them.
run_step() {
    local command status=0 before
    command=(srun --gpu-bind=none ${cpus_per_task:+--cpus-per-task="$cpus_per_task"}
        env ${venv:+PATH="$venv/bin:$PATH"} DEQA_DISTRIBUTED=auto "${job[@]}")
    if [[ -n $dry_run ]]; then
        quote "${command[@]}"
        return
    fi
    needs_tool srun "SLURM's commands, or run this where they are"
    trap pass_on TERM
    "${command[@]}" </dev/null 3>&- &
    step=$!
    # A signal ends a wait as well.
    while before=$signals status=0 && { wait "$step" || status=$?; } && ((signals != before)); do :; done
    ((status)) || return 0
    ((signals)) || fail "the command failed with status $status"
    requeue
}

pass_on() {
    signals=$((signals + 1))
    [[ -z $step ]] || kill -TERM "$step" 2>/dev/null || true
}

# A job that was cancelled, or that SLURM queues again by itself, is not running any more and stays as it is.
requeue() {
    local state
    state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z]*') || state=unknown
    [[ $state == JobState=RUNNING ]] || fail "the command was stopped, and the job is not to run again (${state#*=})"
    ((${SLURM_RESTART_COUNT:-0} < restarts)) ||
        fail "the command was stopped, and no restarts are left: submit it again to go on"
    scontrol requeue "$SLURM_JOB_ID" ||
        fail "the command was stopped; the job could not be queued again: submit it again"
    say "the command was stopped before the job's end; the job is queued again"
}

main "$@"
