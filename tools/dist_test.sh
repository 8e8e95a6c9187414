#!/usr/bin/env bash
# Distributed test: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
#
# On a machine without a GPU, GPUS is the number of CPU processes. For several machines, run it
# on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
set -euo pipefail

if (($# < 3)); then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3
SCRIPT=test.py exec "$(dirname "${BASH_SOURCE[0]}")/dist_train.sh" \
  "$config" "$gpus" "$checkpoint" "$@"
