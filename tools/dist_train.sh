#!/usr/bin/env bash
# Distributed training: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
#
# On a machine without a GPU, GPUS is the number of CPU processes. For several machines, run it
# on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
set -euo pipefail

if (($# < 2)); then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
# For the line that says how to go on after a signal.
export SER_MM_COMMAND=${SER_MM_COMMAND-$(printf '%q ' "$0" "$@")}
config=$1 gpus=$2
shift 2
port=${PORT:-29500}
if [[ ! $port =~ ^[0-9]{1,5}$ ]] || ((10#$port < 1 || 10#$port > 65535)); then
  echo "error: PORT=$port is not a port; set PORT=29501, say, a number up to 65535." >&2
  exit 2
fi
tools=$(dirname "${BASH_SOURCE[0]}")

# An active environment goes first, then the project's own, then whatever python is.
python=python
if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $tools/../.venv/bin/python ]]; then
  python=$tools/../.venv/bin/python
fi

# torchrun would give each process one thread; without a GPU, share the cores out instead.
if [[ -z ${OMP_NUM_THREADS:-} ]] && ! nvidia-smi -L >/dev/null 2>&1; then
  threads=$(($(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) / gpus))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
  export MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS}
fi

exec "$python" "$tools/_launch.py" \
  --nnodes="${NNODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="$port" \
  --nproc_per_node="$gpus" \
  "$tools/${SCRIPT:-train.py}" "$config" --launcher pytorch "$@"
