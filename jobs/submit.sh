#!/usr/bin/env bash
# Distils a student, or searches for the best way to, as a Ray job. Further arguments are overrides of the configuration:
#   RUNS=/shared/runs TEACHER=/shared/runs/teacher jobs/submit.sh distill student=mlp train.epochs=20
#   RUNS=/shared/runs TEACHER=/shared/runs/teacher jobs/submit.sh search search=temperature search.num_trials=32
# A cluster that asks for a token (RAY_AUTH_MODE=token) also needs RAY_AUTH_MODE=token here.
set -euo pipefail

COMMAND="${1:?give the command: distill or search}"
shift
export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" # the head's dashboard
RUNS="${RUNS:-/shared/runs}"                                                     # storage that every node sees
NAME="${NAME:-$COMMAND}"                                                         # folder of the run below RUNS
TEACHER="${TEACHER:-$RUNS/teacher}"                                              # run folder of train-teacher, or a file
PLACES=("run.dir=$RUNS/$NAME" "teacher.checkpoint=$TEACHER")
if [[ "$COMMAND" == search ]]; then
    PLACES+=("cache.path=$RUNS/cache")
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ray job submit --working-dir . -- python -m pipeline "$COMMAND" "${PLACES[@]}" "$@"
