#!/usr/bin/env bash
# Runs a command on the hosts of a TPU slice of a GKE cluster, as the JobSet of gke_jobset.yaml.
#
#   launch/gke.sh run --name N --image I --accelerator A --topology T [OPTION …] -- COMMAND …
#   launch/gke.sh follow|delete --name N [--namespace S] [--dry-run]
#
# run      has the JobSet made, shows the first pod's log, and ends as the JobSet does
# follow   shows the log of a JobSet that is there, and ends as it does
# delete   deletes the JobSet, which stops it
#
#   --name N             what the JobSet is called
#   --image I            container image with deqa in it; docs/launch.md has a Dockerfile
#   --accelerator A      as GKE calls it: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice …
#   --topology T         of the slice, in chips: 4x4, 2x2x2 …
#   --chips-per-host N   chips that a host of it has (4)
#   --spot               on spot machines, which may be taken away at any time
#   --claim C            persistent volume claim, in every pod as /data
#   --restarts N         how often all pods start again when one fails or is taken away (100)
#   --namespace S        instead of kubectl's own namespace
#   --dry-run            print the commands and the manifest, and run nothing
#
# DEQA_POLL_SECONDS is the time between two looks at what is not ready (30).
#
# example: launch/gke.sh run --name scorer --image europe-docker.pkg.dev/my-project/deqa/deqa:1 \
#     --accelerator tpu-v5-lite-podslice --topology 4x4 --spot --claim shared -- \
#     deqa train --config_path mix3_lora.yaml --model /data/mix3 --output /data/runs/lora

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

name='' image='' accelerator='' topology='' chips_per_host=4 spot='' claim='' restarts=100 namespace=''
hosts=''

# The pod that is followed, how many lines of its log have been printed, and what was last said of pods.
pod='' shown=0 told=''

main() {
    local action=${1:-} label='[a-z0-9]([-a-z0-9]*[a-z0-9])?'
    case $action in
        run)
            parse "name image accelerator topology chips-per-host claim restarts namespace" "spot dry-run" "${@:2}"
            ;;
        follow | delete) parse "name namespace" "dry-run" "${@:2}" ;;
        -h | --help) help ;;
        *) misuse "'$action' is nothing to do: begin with run, follow or delete" ;;
    esac
    needs name scorer
    matches name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "name of at most 40 small letters, digits and -"
    matches namespace "$label" "namespace"
    needs_tool kubectl "it, with a cluster that it knows"
    kubectl=(kubectl ${namespace:+--namespace="$namespace"})
    [[ $action == run ]] || ((!${#job[@]})) || misuse "$action takes no command: leave out -- and what follows"
    "do_$action"
}

do_run() {
    local before
    check_run
    before=$(jobset_state)
    case $before in
        unknown) fail "kubectl does not say whether there is a $name" ;;
        Completed | Failed)
            fail "$name is there from before ($before): delete it, by" \
                "$(quote "$here/${0##*/}" delete --name "$name" ${namespace:+--namespace "$namespace"})"
            ;;
    esac
    apply || fail "kubectl did not accept the JobSet; it says above why"
    do_follow
}

do_follow() {
    local state
    while state=$(jobset_state) && [[ $state != Completed && $state != Failed ]]; do
        [[ $state != absent || -n $dry_run ]] || fail "there is no JobSet $name: \`run\` makes it"
        show_log
        [[ -z $dry_run ]] || exit 0
        pause
    done
    show_log # what came since
    if [[ $state == Completed ]]; then
        say "$name ended well"
        exit 0
    fi
    say "$name failed; the last lines of every pod:"
    ask "${kubectl[@]}" logs --selector="jobset.sigs.k8s.io/jobset-name=$name" --tail=20 --prefix >&2 || true
    exit 1
}

do_delete() { act "${kubectl[@]}" delete jobset "$name" || fail "$name could not be deleted; kubectl says above why"; }

check_run() {
    needs image registry/deqa:1
    needs accelerator tpu-v5-lite-podslice
    needs topology 4x4
    needs_job
    matches image '[A-Za-z0-9][-A-Za-z0-9._:/@]*' "image"
    matches accelerator "$label" "accelerator"
    matches topology '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "topology like 4x4 or 2x2x2"
    matches chips-per-host '[1-9][0-9]*' "number of at least 1"
    matches claim '[a-z0-9]([-.a-z0-9]*[a-z0-9])?' "name of a claim"
    matches restarts '[0-9]+' "number"
    local chips=$((${topology//x/*}))
    ((chips % chips_per_host == 0)) ||
        misuse "the $chips chips of --topology $topology are no whole number of hosts of $chips_per_host:" \
            "set --chips-per-host"
    hosts=$((chips / chips_per_host))
}

# ---- the manifest -----------------------------------------------------------------------------------------

manifest() {
    local line
    while IFS= read -r line; do
        [[ $line != '#'* ]] || continue
        [[ $line != *'# with --spot' || -n $spot ]] || continue
        [[ $line != *'# with --claim' || -n $claim ]] || continue
        line=${line%' # with --'*}
        line=${line//@NAME@/"$name"}
        line=${line//@RESTARTS@/"$restarts"}
        line=${line//@HOSTS@/"$hosts"}
        line=${line//@CHIPS@/"$chips_per_host"}
        line=${line//@ACCELERATOR@/"$accelerator"}
        line=${line//@TOPOLOGY@/"$topology"}
        line=${line//@CLAIM@/"$claim"}
        line=${line//@IMAGE@/"$image"}
        line=${line/@COMMAND@/"$(json "${job[@]}")"}
        printf '%s\n' "$line"
    done <"$here/gke_jobset.yaml"
}

# Words as a JSON list of strings, in which Kubernetes replaces nothing: it would replace $(NAME).
json() {
    local word code character items=''
    for word; do
        word=${word//\\/\\\\}
        word=${word//\"/\\\"}
        word=${word//\$/\$\$}
        for code in {1..31} 127; do
            printf -v code '\\u%04x' "$code"
            printf -v character '%b' "$code"
            word=${word//"$character"/"$code"}
        done
        items+=", \"$word\""
    done
    printf '[%s]' "${items#, }"
}

apply() {
    if [[ -n $dry_run ]]; then
        printf "%s <<'END'\n%s\nEND\n" "$(quote "${kubectl[@]}" apply --filename -)" "$(manifest)" >&3
    else
        manifest | "${kubectl[@]}" apply --filename - >&2
    fi
}

# ---- what becomes of it -----------------------------------------------------------------------------------

# absent, there, Completed or Failed; unknown if kubectl cannot say.
jobset_state() {
    local found
    found=$(ask "${kubectl[@]}" get jobset "$name" --ignore-not-found \
        --output='jsonpath={.metadata.name}{"\n"}{range .status.conditions[?(@.status=="True")]}{.type}{"\n"}{end}') ||
        found=unknown
    case $'\n'$found$'\n' in
        $'\n\n') echo absent ;;
        $'\nunknown\n') echo unknown ;;
        *$'\nCompleted\n'*) echo Completed ;;
        *$'\nFailed\n'*) echo Failed ;;
        *) echo there ;;
    esac
}

# Name and phase of the newest pod with the number 0.
first_pod() {
    ask "${kubectl[@]}" get pods --sort-by=.metadata.creationTimestamp \
        --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" \
        --output='jsonpath={range .items[*]}{.metadata.name} {.status.phase}{"\n"}{end}' | tail -n 1
    [[ -z $dry_run ]] || echo POD Running
}

# Prints the lines that have not been printed of the first pod's log, as they come; after a restart that is another pod.
show_log() {
    local now phase line number=0
    read -r now phase < <(first_pod) || true
    [[ "$now $phase" == "$told" || -z $now || -n $dry_run ]] || say "$now: $phase"
    told="$now $phase"
    [[ $now == "$pod" ]] || pod=$now shown=0
    [[ -n $now && $phase != Pending ]] || return 0
    # Of a pod that still runs, a last line without its end was cut off.
    while IFS= read -r line || [[ -n $line && $phase != Running ]]; do
        number=$((number + 1))
        ((number > shown)) || continue
        printf '%s\n' "$line"
        shown=$number
    done < <(ask "${kubectl[@]}" logs --follow "$pod")
}

main "$@"
