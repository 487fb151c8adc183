# Sourced by the batch scripts, which set ROOT (the repository). Checks the environment, then
#   train STAGE CONFIG [section.key=value ...]
# runs one rank a GPU under srun, below supervise.sh, and requeues the job when the time limit comes.
# shellcheck shell=bash

say() { echo "[job $SLURM_JOB_ID] $(date '+%F %T') $*"; }
fail() { echo "error: $*" >&2; exit 2; }

if [ -n "$VENV" ]; then
    [ -f "$VENV/bin/activate" ] || fail "VENV=$VENV: there is no bin/activate in it"
    # shellcheck source=/dev/null
    . "$VENV/bin/activate"
elif [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f "$ROOT/.venv/bin/activate" ]; then
    # shellcheck source=/dev/null
    . "$ROOT/.venv/bin/activate"
fi
command -v python >/dev/null || fail "there is no python on PATH: submit from an active environment, or set VENV=/path"
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || fail "GPUS=$GPUS: must be the number of GPUs (ranks) on a node"

NODES=${SLURM_JOB_NUM_NODES:-1}
LOGS=$PWD/slurm-logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
MASTER_ADDR=127.0.0.1
if [ "$NODES" -gt 1 ]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
fi
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export GPUS MASTER_ADDR MASTER_PORT

train() {
    local stage=$1 config=$2 before after code=0 signal=0 child log
    shift 2
    local words=("$ROOT/launch/$stage.py" --deepspeed "$DEEPSPEED" --config "$config" "$@")
    # --wait: the ranks of one that died are in a collective that never ends. Not --kill-on-bad-exit: of ranks that
    # leave together with exit code 2, it would kill the slower ones, and srun would report that instead.
    local ranks=(srun --nodes="$NODES" --ntasks="$((NODES * GPUS))" --ntasks-per-node="$GPUS"
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=60 --open-mode=append --output="$LOGS/rank-%t.log"
        "$ROOT/launch/slurm/rank.sh" "${words[@]}")
    mkdir -p "$LOGS" || fail "$LOGS cannot be made: submit from a folder that can be written"
    before=$(python "$ROOT/launch/progress.py" "${words[@]}")
    say "$stage $config $*: $NODES node(s) x $GPUS ranks, start ${SLURM_RESTART_COUNT:-0} from step ${before:-unknown}," \
        "logs $LOGS/rank-*.log"

    "$ROOT/launch/supervise.sh" --restarts "$RESTARTS" -- "${ranks[@]}" &
    child=$!
    trap 'signal=10; kill -USR1 "$child"' USR1   # --signal: the time limit is near
    trap 'signal=15; kill -TERM "$child"' TERM   # scancel, or preemption
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done
    wait "$child"
    code=$?

    if [ "$code" -eq 0 ]; then say "done"; exit 0; fi
    after=$(python "$ROOT/launch/progress.py" "${words[@]}")
    if [ "$signal" -eq 10 ] && [ "$code" -eq 138 ]; then
        if [ "${after%% *}" = "${before%% *}" ]; then
            say "not requeued: this start took no step before the time limit came (step ${after:-unknown}); raise --time"
            exit 1
        fi
        say "the time limit is near: saved as step ${after%% *}, requeued"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    [ "$code" -ne 143 ] || { say "cancelled: saved as step ${after%% *}; the same command resumes"; exit 143; }
    for log in "$LOGS"/rank-*.log; do
        echo "== $log"
        tail -n 8 "$log"
    done
    say "failed with exit code $code; the newest good checkpoint is step ${after:-unknown}"
    exit "$code"
}
