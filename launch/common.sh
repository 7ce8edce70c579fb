# shellcheck shell=bash
# What the launch scripts share; they source this file.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "${0##*/}: needs bash 4.4 or newer, and this is ${BASH_VERSION}; install one and run the script by it" >&2
    exit 1
fi

dry_run=
# What follows -- on the command line.
job=()
# Commands that are printed and not run go to the script's output, wherever they come from.
exec 3>&1

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

misuse() {
    say "$*; --help shows an example"
    exit 2
}

# The comment on top of the script.
help() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
}

# parse "OPTIONS WITH A VALUE" "FLAGS" ARGUMENT…: sets the variable of each option's name (a flag to yes), and `job`.
parse() {
    local with_value=" $1 " flags=" $2 " option
    shift 2
    while (($#)); do
        option=${1#--} option=${option%%=*}
        case $1 in
            -h | --help) help ;;
            --)
                job=("${@:2}")
                return
                ;;
            --*) ;;
            *) misuse "$1 is no option: put -- before the command to run" ;;
        esac
        if [[ $flags == *" $option "* && $1 != *=* ]]; then
            printf -v "${option//-/_}" yes
        elif [[ $with_value != *" $option "* ]]; then
            misuse "there is no option $1: leave it out, or put it after -- if it is the command's"
        elif [[ $1 == *=* ]]; then
            printf -v "${option//-/_}" %s "${1#*=}"
        elif (($# > 1)) && [[ $2 != --* ]]; then
            printf -v "${option//-/_}" %s "$2"
            shift
        else
            misuse "--$option is without its value: give one"
        fi
        shift
    done
}

# needs OPTION EXAMPLE
needs() {
    local variable=${1//-/_}
    [[ -n ${!variable} ]] || misuse "--$1 is missing: give it, as in --$1 $2"
}

# matches OPTION PATTERN WHAT: the option's value is as the regular expression says, or not given.
matches() {
    local variable=${1//-/_}
    [[ -z ${!variable} || ${!variable} =~ ^($2)$ ]] || misuse "--$1 '${!variable}' is no $3: give one"
}

needs_job() { ((${#job[@]})) || misuse "there is no command: give it after --, as in -- deqa train --config_path F"; }

# needs_tool TOOL WHERE IT COMES FROM
needs_tool() { [[ -n $dry_run ]] || command -v "$1" >/dev/null || misuse "$1 is not on the PATH: install $2"; }

# Words as one line that any shell reads as these words.
quote() {
    local word words=()
    for word; do
        if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
            words+=("$word")
        else
            words+=("'${word//\'/\'\\\'\'}'")
        fi
    done
    printf '%s\n' "${words[*]}"
}

# Runs a command whose output is wanted; with --dry-run prints it instead.
ask() {
    if [[ -n $dry_run ]]; then
        quote "$@" >&3
    else
        "$@" </dev/null 3>&-
    fi
}

# Runs a command that does something; with --dry-run prints it instead.
act() { ask "$@" >&2; }

# Between two looks at how things are.
pause() { [[ -n $dry_run ]] || sleep "${DEQA_POLL_SECONDS:-30}"; }
