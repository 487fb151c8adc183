#!/usr/bin/env bash
# Watches over one training command, outside the launcher: passes signals on to the ranks, waits for their checkpoint,
# and starts the command again (it resumes by itself) when it failed.
#
#   launch/supervise.sh [--restarts N] -- COMMAND ...
#   launch/supervise.sh --restarts 3 -- deepspeed launch/pretrain.py --deepspeed ds_configs/zero2.json --config demo
#
# TERM, INT and USR1 to this process: the ranks finish their step, save and leave. A second INT kills them at once.
# Exit codes: 0 done; 128 + signal after a stop that was asked for and saved; else the command's own. It is started again
# up to N times (default 0), but not after exit code 2 (a mistake that a restart cannot mend), and not when two starts in
# a row have brought no newer checkpoint. SUPERVISE_PAUSE: seconds before the first restart (5), doubled each time.
# SUPERVISE_GRACE: seconds that processes may outlive their launcher, to save (120).
set -u

usage="usage: launch/supervise.sh [--restarts N] -- COMMAND ..."
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
restarts=0
while [ $# -gt 0 ]; do
    case $1 in
        --restarts) [[ ${2:-} =~ ^[0-9]+$ ]] || { echo "error: --restarts takes a number; $usage" >&2; exit 2; }
            restarts=$2; shift 2 ;;
        -h | --help) sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        --) shift; break ;;
        *) echo "error: \`$1\` is not an option; $usage" >&2; exit 2 ;;
    esac
done
[ $# -gt 0 ] || { echo "error: there is no command; $usage" >&2; exit 2; }
command -v "$1" >/dev/null || { echo "error: $1: command not found; activate the environment it is in" >&2; exit 2; }
command -v setsid >/dev/null || { echo "error: setsid is missing (Debian: util-linux)" >&2; exit 2; }

# The Python that knows minillm: the active environment's, else the one beside the command.
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then python=$(command -v python); else
    python=$(dirname "$(command -v "$1")")/python
    [ -x "$python" ] || python=python3
fi

asked=0      # number of the first signal we were sent
group=0      # process group of the command, 0 while there is none

say() { echo "[supervise] $(date '+%F %T') $*"; }
members() { ps -eo pgid=,stat= | awk -v group="$1" '$1 == group && $2 !~ /^Z/ { n++ } END { print n + 0 }'; }
# Whatever was asked for, the ranks get USR1: the launchers ignore it (below), and so does W&B's process.
pass_on() { [ "$group" -eq 0 ] || kill -USR1 -- "-$group" 2>/dev/null; }

stop() {
    if [ "$1" -eq 2 ] && [ "$asked" -eq 2 ] && [ "$group" -ne 0 ]; then
        say "INT again: killing the ranks, nothing is saved"
        kill -KILL -- "-$group" 2>/dev/null
    elif [ "$asked" -eq 0 ]; then
        asked=$1
        say "signal $1: asking the ranks to finish their step and save"
    fi
    pass_on
}
trap 'stop 15' TERM
trap 'stop 2' INT
trap 'stop 10' USR1

# "STEP FOLDER" of the newest good checkpoint of the command's run, "0 none" before the first, "" if that cannot be told.
newest() { "$python" "$here/progress.py" "$@"; }

# Sleeps in pieces, so that a signal is acted on at once: `wait` ends for a trap, `sleep` alone does not.
pause() { sleep "$1" & wait $!; }

# Runs the command to its end; its exit code is in $code. It has a process group (and session) of its own, so that a
# Ctrl-C at the terminal comes to us alone: it would end W&B's process. The ignored signals are inherited: the deepspeed
# runner and launch.py would die of USR1, and a rank that got a stop signal twice before it has saved. The rank's own
# handler takes the place of what it inherits.
run() {
    local polls=0
    ( trap '' USR1 TERM INT; exec setsid "$@" ) &
    group=$!
    # A guard for the case that this script is killed: its end of the pipe closes, and the ranks are told to save.
    exec {alive}> >(trap '' TERM INT USR1
        read -r _
        while [ "$(members "$group")" -gt 0 ]; do kill -USR1 -- "-$group"; sleep 5; done 2>/dev/null)
    while kill -0 "$group" 2>/dev/null; do
        pause 1
        polls=$((polls + 1))
        # Again and again: while it starts, a rank has no handler yet and the signal is lost.
        [ "$asked" -eq 0 ] || [ $((polls % 5)) -ne 0 ] || pass_on
    done
    wait "$group"
    code=$?
    settle
    exec {alive}>&-
    group=0
}

# Waits for what outlived the launcher: ranks notice that it is gone, save and leave. A run folder has one writer.
settle() {
    local left waited=0 grace=${SUPERVISE_GRACE:-120}
    left=$(members "$group")
    [ "$left" -gt 0 ] || return 0
    while [ "$(members "$group")" -gt 0 ] && [ "$waited" -lt "$grace" ]; do
        [ "$waited" -ne 5 ] || say "the launcher is gone (exit code $code), $left processes are not: waiting for them"
        pause 1
        waited=$((waited + 1))
    done
    if [ "$(members "$group")" -gt 0 ]; then
        say "killing what is left after $grace s"
        kill -KILL -- "-$group" 2>/dev/null
    fi
    # A runner whose launch.py was killed says 0; that of a finished run is quick to say so again.
    if [ "$code" -eq 0 ] && [ "$waited" -ge 1 ]; then code=1; fi
}

delay=${SUPERVISE_PAUSE:-5}
stuck=0
tries=0
before=$(newest "$@")
while true; do
    run "$@"
    [ "$code" -ne 0 ] || exit 0
    after=$(newest "$@")
    seen="the newest good checkpoint is step ${after:-unknown}"
    if [ "$asked" -ne 0 ]; then
        if [ "$code" -eq $((128 + asked)) ] || [ "$code" -eq 138 ]; then
            say "the ranks saved and left; $seen"
            exit $((128 + asked))
        fi
        say "stopped as asked, but the ranks did not leave in order (exit code $code); $seen"
        exit "$code"
    fi
    if [ "$code" -eq 2 ]; then
        say "exit code 2: a mistake in configuration, data or disk, which a restart cannot mend; see the error above"
        exit 2
    fi
    if [ -n "$before" ] && [ -n "$after" ] && [ "${after%% *}" -le "${before%% *}" ]; then
        stuck=$((stuck + 1))
    else
        stuck=0
    fi
    if [ "$tries" -ge "$restarts" ]; then
        say "the command failed (exit code $code) and has been started again $tries of $restarts times; $seen"
        exit "$code"
    fi
    if [ "$stuck" -ge 2 ]; then
        say "giving up: two starts in a row failed (exit code $code) without a newer checkpoint: before step $before," \
            "after step $after"
        exit "$code"
    fi
    tries=$((tries + 1))
    say "the command failed (exit code $code); $seen; restart $tries of $restarts in $delay s"
    for ((waited = 0; waited < delay && asked == 0; waited++)); do pause 1; done
    if [ "$asked" -ne 0 ]; then
        say "nothing was running; $seen"
        exit $((128 + asked))
    fi
    delay=$((delay * 2 < 300 ? delay * 2 : 300))
    before=$after
done
