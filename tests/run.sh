#!/usr/bin/env bash
# The tests: installs what they need, checks the style, runs them.
#
#   bash tests/run.sh             the default set (20 minutes or so on 2 cores)
#   bash tests/run.sh --slow      the slow ones (marker `slow`: 2 GB corpus, 8 ranks) as well
#   bash tests/run.sh --faults    the fault campaign (marker `faults`: kills, damage, full disks) as well
#   bash tests/run.sh --slurm     the batch scripts on a Slurm of this machine, and two hosts (marker `slurm`) as well
#   bash tests/run.sh --versions  the core set with the oldest, the tested and the newest packages, each installed anew
#   bash tests/run.sh ARGS...     ARGS go to pytest, for example tests/models -k rope
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in --versions) exec "${PYTHON:-python3}" tests/versions/drive.py "${@:2}" ;; esac
. launch/environment.sh tests

marker="not slow and not slurm and not faults"
while true; do
    case "${1:-}" in
        --slow) marker=${marker/not slow/(slow or not slow)}; shift ;;
        --faults) marker=${marker/not faults/(faults or not faults)}; shift ;;
        --slurm) marker=${marker/not slurm/(slurm or not slurm)}; shift ;;
        *) break ;;
    esac
done
ruff check .
python -m pytest -m "$marker" "$@"
