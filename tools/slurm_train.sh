#!/usr/bin/env bash
# Training under Slurm:
# tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [arguments of tools/train.py]
# Variables: PORT (29500), GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (10), SRUN_ARGS
set -euo pipefail

if (($# < 3)); then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
# For the line that says how to go on after a signal.
export SER_MM_COMMAND=${SER_MM_COMMAND-$(printf '%q ' "$0" "$@")}
partition=$1 job_name=$2 config=$3
shift 3
if (($#)) && [[ $1 != -* ]]; then
  work_dir=$1
  shift
  set -- --work-dir "$work_dir" "$@"
fi
tools=$(dirname "${BASH_SOURCE[0]}")

gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}

python=python
if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $tools/../.venv/bin/python ]]; then
  python=$tools/../.venv/bin/python
fi

# Where rank 0 waits for the others.
export MASTER_PORT=${PORT:-${MASTER_PORT:-29500}}

# SRUN_ARGS is a list of options and is split on purpose.
# shellcheck disable=SC2086
exec srun \
  --partition="$partition" \
  --job-name="$job_name" \
  --gres="gpu:$gpus_per_node" \
  --ntasks="$gpus" \
  --ntasks-per-node="$gpus_per_node" \
  --cpus-per-task="${CPUS_PER_TASK:-10}" \
  --kill-on-bad-exit=1 \
  ${SRUN_ARGS:-} \
  "$python" -u "$tools/train.py" "$config" --launcher slurm "$@"
