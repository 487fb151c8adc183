#!/usr/bin/env bash
# The tests: installs what they need, checks the style, runs them.
#
#   bash tests/run.sh             the default set, in two processes side by side
#   bash tests/run.sh --slow      the slow ones (marker `slow`: second examples of a law, 4 and 8 ranks) as well
#   bash tests/run.sh --faults    the fault campaign (marker `faults`: kills, damage, full disks) as well
#   bash tests/run.sh --slurm     the batch scripts on a Slurm of this machine, and two hosts (marker `slurm`) as well
#   bash tests/run.sh --all       everything
#   bash tests/run.sh --versions  the core set with the oldest, the tested and the newest packages, each installed anew
#   bash tests/run.sh --gpu       what one runs on a new GPU node: right, how fast, does it fit the plan (--help)
#   bash tests/run.sh ARGS...     ARGS go to pytest, for example tests/models -k rope
#
# With ARGS or a marker it is one process: -n 2 --dist loadfile makes it two.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in --versions) exec "${PYTHON:-python3}" tests/versions/drive.py "${@:2}" ;; esac
. launch/environment.sh tests
case "${1:-}" in --gpu) exec python tests/gpu/check.py "${@:2}" ;; esac

marker="not slow and not slurm and not faults"
workers=""
[ $# -gt 0 ] || workers="-n 2 --dist loadfile --no-loadscope-reorder"
while true; do
    case "${1:-}" in
        --slow) marker=${marker/not slow/(slow or not slow)}; shift ;;
        --faults) marker=${marker/not faults/(faults or not faults)}; shift ;;
        --slurm) marker=${marker/not slurm/(slurm or not slurm)}; shift ;;
        --all) marker=""; shift ;;
        *) break ;;
    esac
done
ruff check .
python -m pytest $workers -m "$marker" "$@"
