#!/usr/bin/env bash
# Runs a command on all workers of a Cloud TPU slice, to its end, however often the slice is taken away meanwhile.
#
#   launch/tpu_vm.sh run --name N --zone Z --type T [OPTION …] -- COMMAND …
#   launch/tpu_vm.sh follow|status|stop|delete --name N --zone Z [--project P] [--dry-run]
#
# run      makes the slice or takes the one of that name, installs this checkout there, starts the command on all
#          workers, and shows the first one's log; the same command line again finds it running and shows its log
# follow   shows the log of what is running, to its end
# status   says how the slice and the command on each worker are
# stop     has the command stop; `deqa train` saves first
# delete   deletes the slice
#
#   --name N         what the slice is called
#   --zone Z         where it is
#   --project P      instead of gcloud's own project
#   --type T         its kind and size: v5litepod-16, v6e-8, v4-32 …
#   --version V      its runtime, if not the usual one of its type
#   --spot           a cheaper one that may be taken away at any time
#   --bucket B       Cloud Storage bucket, on every worker as the folder `bucket`, which all of them share
#   --restarts N     how often to make the slice again when it is taken away (100)
#   --delete         delete the slice at the end, whatever the end is
#   --dry-run        print the commands, and run none
#
# The command runs in ~/deqa of each worker; a local file after --config_path is copied there. DEQA_POLL_SECONDS is the
# time between two looks at a slice that is not ready (30).
#
# example: launch/tpu_vm.sh run --name scorer --zone us-central1-a --type v5litepod-16 --spot --bucket my-bucket -- \
#     deqa train --config_path configs/mix3_lora.yaml --model bucket/mix3 --output bucket/runs/lora

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

name='' zone='' project='' type='' version='' spot='' bucket='' restarts=100 delete=''

# Whether there is a slice that costs money, as far as known.
exists=
# The status that the command ended with on the first worker.
outcome=
# Lines of its log that have been printed, and whether these are all.
shown=0 whole=
# What a slice is said to be with --dry-run.
pretended=ACTIVE
# The local folder of what is sent.
stage=''
# Ends each line of the log on its way here: one without was cut off.
mark=$'\x1e'

main() {
    local action=${1:-}
    case $action in
        run) parse "name zone project type version bucket restarts" "spot delete dry-run" "${@:2}" ;;
        follow | status | stop | delete) parse "name zone project" "dry-run" "${@:2}" ;;
        -h | --help) help ;;
        *) misuse "'$action' is nothing to do: begin with run, follow, status, stop or delete" ;;
    esac
    needs name scorer
    needs zone us-central1-a
    matches name '[a-z]([-a-z0-9]*[a-z0-9])?' "name of small letters, digits and -"
    needs_tool gcloud "the Google Cloud CLI"
    where=(--zone="$zone" ${project:+--project="$project"})
    [[ $action == run ]] || ((!${#job[@]})) || misuse "$action takes no command: leave out -- and what follows"
    "do_$action"
}

# ---- what can be done -------------------------------------------------------------------------------------

do_run() {
    needs type v5litepod-16
    needs_job
    needs_tool python3 "Python, which builds the wheel that is sent"
    matches restarts '[0-9]+' "number"
    [[ -n $version ]] || version=$(usual_version)
    pretended=NONE
    pack
    trap closing EXIT
    obtain
    until start && follow; do
        again "the run on $name was broken off"
        obtain
    done
    conclude
}

do_follow() {
    needs_active
    follow || fail "$name was taken away or restarted: \`run\` with the options of before goes on"
    conclude
}

do_status() {
    local state
    state=$(machine_state)
    [[ $state != UNKNOWN ]] || fail "gcloud does not say how $name is"
    [[ -n $dry_run ]] || echo "$name: $state"
    [[ $state != ACTIVE ]] || remote all "$(state_snippet) | sed \"s/^deqa:/\$(hostname):/\"" ||
        fail "not every worker of $name answers"
}

do_stop() {
    needs_active
    remote all "$(stop_snippet)" >&2 || fail "not every worker of $name could be told to stop"
    [[ -n $dry_run ]] || say "told to stop; \`follow\` shows how it ends, and \`delete\` deletes the slice"
}

do_delete() {
    case $(machine_state) in
        NONE) say "there is no $name in $zone" ;;
        UNKNOWN) fail "gcloud does not say how $name is; nothing was deleted" ;;
        *) remove || fail "$name could not be deleted" ;;
    esac
}

needs_active() {
    local state
    state=$(machine_state)
    [[ $state == ACTIVE ]] || fail "$name is not there to be asked (state $state): \`run\` makes it"
}

# The end of `run`, whatever it is.
closing() {
    local status=$?
    trap - EXIT
    if [[ -n $exists && -n $delete ]]; then
        remove || {
            say "$name could not be deleted: IT STILL COSTS MONEY"
            status=1
        }
    elif [[ -n $exists && -z $dry_run ]]; then
        say "$name still exists and costs money; to delete it:" \
            "$(quote "$here/${0##*/}" delete --name "$name" "${where[@]}")"
    fi
    exit "$status"
}

conclude() {
    [[ -z $dry_run ]] || exit 0
    if [[ $outcome == 0 ]]; then
        say "the command ended with status 0"
        exit 0
    fi
    say "the command failed with status $outcome; the last lines of every worker:"
    remote all "tail -n 20 ~/deqa/.run/log | sed \"s/^/[\$(hostname)] /\"" >&2 || true
    exit 1
}

# ---- the slice --------------------------------------------------------------------------------------------

usual_version() {
    case $type in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) echo tpu-ubuntu2204-base ;;
    esac
}

# describe KIND FIELD: the state of what has the slice's name; NONE if nothing has, UNKNOWN if gcloud cannot say.
describe() {
    local errors state
    state=$({ errors=$(ask gcloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)" 2>&1 >&4) ||
        { [[ $errors == *NOT_FOUND* ]] && echo NONE >&4; } || { echo UNKNOWN >&4 && echo "$errors" >&2; }; } 4>&1)
    echo "${state:-UNKNOWN}"
}

# ACTIVE if the slice can be used. A slice that was not made by a request in the queue is used as well.
machine_state() {
    local queued node
    queued=$(describe queued-resources state.state)
    if [[ -n $dry_run ]]; then
        describe tpu-vm state >/dev/null
        echo "$pretended"
        return
    fi
    if [[ $queued != ACTIVE && $queued != NONE ]]; then
        echo "$queued"
        return
    fi
    node=$(describe tpu-vm state)
    case $queued:$node in
        # The request hears of it later.
        ACTIVE:PREEMPTED | ACTIVE:TERMINATED) echo "$node" ;;
        ACTIVE:NONE) echo GONE ;;
        ACTIVE:* | NONE:READY) echo ACTIVE ;;
        *) echo "$node" ;;
    esac
}

# Until the slice can be used, made new where that is needed.
obtain() {
    local state last=''
    while state=$(machine_state) && [[ $state != ACTIVE ]]; do
        [[ $state == "$last" || -n $dry_run ]] || say "$name: $state"
        case $state in
            NONE) create ;;
            FAILED | SUSPENDED | PREEMPTED | TERMINATED | GONE)
                exists=yes
                # What is found like this at first is left from before.
                [[ -z $last ]] || [[ $last == "$state" ]] || again "$name was not to be had"
                remove || say "$name could not be deleted yet"
                ;;
            STOPPED | STOPPING) fail "$name is $state: start it, or delete it" ;;
            UNKNOWN) [[ -n $last ]] || fail "gcloud does not say how $name is" ;;
        esac
        last=$state
        pause
    done
    [[ -n $dry_run ]] || say "$name: ACTIVE"
    exists=yes
}

create() {
    if act gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
        --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}; then
        exists=yes pretended=ACTIVE
    elif [[ -n $exists ]]; then
        again "$name could not be made"
    else
        fail "$name could not be made; gcloud says above why"
    fi
}

remove() {
    if [[ $(describe queued-resources state.state) == NONE ]]; then
        act gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    else
        act gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    fi
}

is_lost() {
    local state
    state=$(machine_state)
    [[ $state != ACTIVE && $state != UNKNOWN ]]
}

# The same, where the slice may be on its way out.
is_being_lost() { is_lost || { pause && is_lost; }; }

# again WHY: uses up a restart.
again() {
    ((restarts > 0)) || fail "$1, and no restarts are left"
    restarts=$((restarts - 1))
    say "$1; trying again ($restarts restarts left)"
}

# ---- what runs on it --------------------------------------------------------------------------------------

# Everything that is sent, in one folder.
pack() {
    local root file
    root=$(dirname "$here")
    stage=${XDG_CACHE_HOME:-$HOME/.cache}/deqa-jax/launch/$name
    [[ -f $root/pyproject.toml ]] || fail "$root is no checkout of the project: run the script from one"
    check_config_files
    act rm -rf "$stage"
    act mkdir -p "$stage/.sent/wheel" "$stage/.sent/files"
    act python3 -m pip wheel --quiet --no-deps --wheel-dir "$stage/.sent/wheel" "$root" ||
        fail "the wheel of $root could not be built; pip says above why"
    while IFS= read -r file; do
        act mkdir -p "$stage/.sent/files/$(dirname "$file")"
        act cp "$file" "$stage/.sent/files/$file"
    done < <(config_files)
}

check_config_files() {
    local file
    while IFS= read -r file; do
        [[ /$file/ != //* && /$file/ != */../* ]] ||
            misuse "--config_path $file cannot be at the same place on the workers:" \
                "give it relative to this folder, below it"
    done < <(config_files)
}

# The local files that the command has after --config_path.
config_files() {
    local word after=''
    for word in "${job[@]}"; do
        [[ $word != --config_path=* ]] || after=yes
        word=${word#--config_path=}
        [[ -z $after || ! -f $word ]] || printf '%s\n' "$word"
        after=
        [[ $word != --config_path ]] || after=yes
    done
}

# remote WORKER SNIPPET: a connection that has gone silent is given up.
remote() {
    ask gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --ssh-flag=-oServerAliveInterval=15 \
        --command="$2"
}

# Has the command running on all workers; fails when the slice is lost.
start() {
    local state
    state=$(command_state)
    if [[ $state == "running $(checksum)" ]]; then
        say "the command is running there already"
        return
    fi
    [[ $state != running* ]] || fail "another command is running on $name: follow it, or stop it first"
    send && remote all "$(install_snippet)" >&2 && remote all "$(start_snippet)" >&2 && return
    is_being_lost || fail "the command could not be started on $name; gcloud and the workers say above why"
    return 1
}

send() {
    remote all 'mkdir -p ~/deqa && rm -rf ~/deqa/.sent' >&2 &&
        act gcloud compute tpus tpu-vm scp --recurse "$stage/.sent" "$name:deqa/" "${where[@]}" --worker=all
}

# Until the command has ended, with its status in `outcome`; fails when the slice is lost.
follow() {
    local state
    shown=0
    while :; do
        show_log
        state=$(command_state)
        [[ -z $dry_run ]] || return 0
        [[ $state != ended* || -n $whole ]] || state="running, or was"
        case $state in
            "ended 0")
                outcome=0
                return
                ;;
            "ended "*)
                outcome=${state#ended }
                # Processes that are killed with their machine fail first.
                ! is_being_lost
                return
                ;;
            running*) say "the connection to the first worker broke; connecting again" ;;
            died)
                say "the command is gone from the first worker, as after a restart of the machine"
                return 1
                ;;
            absent) fail "nothing has been started on $name: \`run\` does" ;;
            *)
                ! is_lost || return 1
                say "the first worker does not answer; trying again"
                ;;
        esac
        pause
    done
}

# Prints the log's lines that have not been printed. gcloud connects again by itself, too, and then begins anew.
show_log() {
    local line number before=$shown
    whole=
    while IFS= read -r line; do
        [[ $line != "end$mark" ]] || whole=yes
        number=${line%%:*}
        [[ $line == *"$mark" && -n $number && $number != *[!0-9]* ]] || continue
        ((before + number > shown)) || continue
        line=${line#*:}
        printf '%s\n' "${line%"$mark"}"
        shown=$((before + number))
    done < <(remote 0 "$(log_snippet $((before + 1)))")
}

# How the command is on the first worker: absent, running CHECKSUM, ended STATUS or died; nothing if it does not answer.
command_state() { { remote 0 "$(state_snippet)" || true; } | sed -n 's/^deqa: //p'; }

checksum() { quote "${job[@]}" | cksum | tr -d ' '; }

# ---- snippets for the workers' shells ---------------------------------------------------------------------
#
# ~/deqa/.run has: log; runner, the process that waits for the command; pid, the command's; checksum, of its words;
# status, when it has ended.

# The runner ends after it has written the status, so it is looked for first.
state_snippet() {
    cat <<'END'
(cd ~/deqa/.run 2>/dev/null && [ -s pid ] || { echo "deqa: absent"; exit; }
alive=; kill -0 "$(cat runner)" 2>/dev/null && alive=yes
if [ -e status ]; then echo "deqa: ended $(cat status)"
elif [ "$alive" ]; then echo "deqa: running $(cat checksum)"
else echo "deqa: died"; fi)
END
}

install_snippet() {
    cat <<'END'
set -e
cd ~/deqa
cp -R .sent/files/. .
PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
[ -e .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --reinstall-package deqa-jax \
  "deqa-jax[tpu,train] @ file://$(ls "$PWD"/.sent/wheel/*.whl)"
END
    [[ -z $bucket ]] || mount_snippet
}

mount_snippet() {
    cat <<'END'
command -v gcsfuse >/dev/null || {
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
}
mkdir -p bucket
END
    echo "mountpoint -q bucket || gcsfuse --implicit-dirs --rename-dir-limit=100000 $(quote "${bucket#gs://}") bucket"
}

# What is running is left alone: gcloud repeats a snippet when the connection breaks.
start_snippet() {
    local words
    words=$(quote "${job[@]}")
    cat <<END
set -e
mkdir -p ~/deqa/.run
cd ~/deqa
if [ -s .run/pid ] && [ ! -e .run/status ] && kill -0 "\$(cat .run/runner)" 2>/dev/null; then exit 0; fi
rm -f .run/status .run/pid .run/runner
echo $(checksum) > .run/checksum
export PATH="\$HOME/deqa/.venv/bin:\$HOME/.local/bin:\$PATH" DEQA_DISTRIBUTED=auto
setsid nohup bash -c '
  echo \$\$ > .run/runner
  "\$@" &
  echo \$! > .run/pid
  wait \$!
  echo \$? > .run/status.new
  mv .run/status.new .run/status
' deqa $words > .run/log 2>&1 < /dev/null &
until [ -s .run/pid ]; do sleep 0.05; done
END
}

# log_snippet FROM: each line with its number, counted from FROM as 1, and the mark; then "end" with the mark.
log_snippet() {
    cat <<END
cd ~/deqa/.run || exit
echo
if [ -e status ]; then tail -n +$1 log; else tail -n +$1 -F -s 0.2 --pid="\$(cat runner)" log 2>/dev/null; fi |
  LC_ALL=C grep -an --line-buffered "" | LC_ALL=C sed -u 's/\$/\\x1e/'
printf 'end\\036\\n'
END
}

stop_snippet() {
    cat <<'END'
cd ~/deqa/.run 2>/dev/null && [ -s pid ] && [ ! -e status ] || exit 0
kill -TERM "$(cat pid)" 2>/dev/null || true
END
}

main "$@"
