#!/usr/bin/env bash
# Distils a student as a Ray job. Further arguments are overrides of the configuration:
#   RUNS=/shared/runs TEACHER=/shared/runs/teacher jobs/submit_distill.sh student=mlp train.epochs=20
# A cluster that asks for a token (RAY_AUTH_MODE=token) also needs RAY_AUTH_MODE=token here.
set -euo pipefail

export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" # the head's dashboard
RUNS="${RUNS:-/shared/runs}"                                                     # storage that every node sees
NAME="${NAME:-student}"                                                          # folder of the run below RUNS
TEACHER="${TEACHER:-$RUNS/teacher}"                                              # run folder of train-teacher, or a file

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ray job submit --working-dir . -- \
    python -m pipeline distill "run.dir=$RUNS/$NAME" "teacher.checkpoint=$TEACHER" "$@"
