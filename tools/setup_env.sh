#!/usr/bin/env bash
# Makes .venv, or brings it up to date, from requirements.txt. A current one costs no time.
#
# Variables: PYTHON    interpreter a new .venv is made with (default: python3)
#            MAX_JOBS  parallel compiler processes          (default: all cores)
#            FORCE_CUDA=1  compile mmcv for CUDA where there is no GPU, as on a login node
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON=${PYTHON:-python3} VENV=.venv STEPS=5
readonly python=$VENV/bin/python stamp=$VENV/ser_mm.stamp
export MAX_JOBS=${MAX_JOBS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() { echo "setup_env: $*" >&2; exit 1; }
step() { echo "[$1/$STEPS] $2"; }
pip() { "$python" -m pip install -qq "$@"; }
# The lines of requirements.txt for these packages.
pins() { for name; do grep -E "^$name[=<>]" requirements.txt || echo "$name"; done; }

# A virtual environment holds absolute paths, so a moved checkout is a stale one.
fingerprint() {
  { cat requirements.txt tools/setup_env.sh; "$1" -VV; pwd; echo "${FORCE_CUDA:-0}"; } | cksum
}

# imaug, which mmdet needs, and numpy 2.2 have no common release for 3.14.
python_fits() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null
}

# Two packages provide cv2 and the last one installed wins; on a machine without display libraries
# (libGL) only the headless one loads.
cv2_without_display() {
  "$python" -c 'import cv2' 2>/dev/null ||
    pip --force-reinstall --no-deps $(pins opencv-python-headless)
}

# The ops fit this torch and, where a GPU can be compiled for, have its kernels.
ops_work() {
  "$python" - "${1:-0}" <<'PY'
import sys

import torch  # noqa: F401  (mmcv._ext links against it)
import mmcv._ext
from mmcv.ops import get_compiling_cuda_version

if sys.argv[1] == '1' and get_compiling_cuda_version() == 'not available':
    sys.exit('mmcv._ext was compiled without CUDA')
PY
}

# Succeeds when there is a GPU, or FORCE_CUDA=1, and a CUDA compiler of the release torch was built with.
can_compile_cuda() {
  "$python" - <<'PY'
import os
import re
import subprocess
import sys

import torch

if not torch.cuda.is_available() and os.environ.get('FORCE_CUDA') != '1':
    sys.exit(1)

from torch.utils.cpp_extension import CUDA_HOME

wanted = torch.version.cuda.split('.')[0]
try:
    told = subprocess.run([f'{CUDA_HOME}/bin/nvcc', '--version'], capture_output=True, text=True)
    found = re.search(r'release (\d+)', told.stdout).group(1)
except (OSError, AttributeError):
    found = 'none'
if found != wanted:
    print(f'      torch is built with CUDA {wanted}, nvcc here is of CUDA {found}: mmcv gets CPU '
          'operators only (enough to pretrain and probe; detection on a GPU needs the others)')
    sys.exit(1)
PY
}

if [[ -x $python && -f $stamp ]] && [[ $(<"$stamp") == "$(fingerprint "$python")" ]]; then
  exit 0
fi

# Everything the long steps need is checked before they start.
if ! python_fits "$python"; then
  python_fits "$PYTHON" ||
    fail "Python 3.10, 3.11, 3.12 or 3.13 is needed; name one with PYTHON=/path/to/python."
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$PYTHON cannot make virtual environments; install its venv package (python3-venv)."
  step 1 "making $VENV (seconds)"
  "$PYTHON" -m venv --clear "$VENV"
else
  step 1 "updating $VENV"
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null
  rm -f "$stamp"
fi
command -v "${CXX:-c++}" >/dev/null ||
  fail "a C++ compiler is needed to build mmcv's operators; install g++ or name one with CXX."
"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  fail "Python's headers are needed to build mmcv's operators; install python3-dev."

step 2 "torch, torchvision and numpy (some 3 GB to download when new: minutes)"
pip $(pins torch torchvision numpy)

# Exactly this setuptools: onedl-mmcv's pyproject.toml is more than the one that comes with venv
# can read, and torch does not build extensions with those after it.
step 3 "build tools (seconds)"
pip $(pins setuptools packaging wheel ninja)

mmcv=$(pins onedl-mmcv)
installed=$("$python" -m pip list --format=freeze | grep '^onedl-mmcv==' || true)
cuda=0
if can_compile_cuda; then cuda=1; fi
if [[ $installed == "$mmcv" ]] && ops_work $cuda 2>/dev/null; then
  step 4 "mmcv and its compiled operators: here already"
else
  step 4 "compiling mmcv's operators, $MAX_JOBS at a time (8 minutes on two cores; more for CUDA)"
  # mmcv compiles for CUDA whenever it sees a GPU; hide it where that cannot succeed. Build
  # isolation hides torch, and then mmcv builds without its operators and says nothing.
  build() (
    ((cuda)) || export CUDA_VISIBLE_DEVICES=
    MMCV_WITH_OPS=1 pip --no-build-isolation "$@" "$mmcv" $(pins onedl-mmengine opencv-python)
    cv2_without_display
  )
  build
  # What pip kept from an earlier build may have no operators, or those of another torch.
  ops_work $cuda 2>/dev/null || build --no-cache-dir --no-deps --force-reinstall
  reason=$(ops_work $cuda 2>&1) || fail "mmcv's operators do not load: ${reason##*$'\n'}"
fi

step 5 "OpenMMLab packages, evaluation and development tools, ser_mm itself (minutes when new)"
pip -r requirements.txt
cv2_without_display
pip --no-deps --no-build-isolation -e .
"$python" -c 'import mmdet, mmpretrain' >/dev/null ||
  fail "the installed packages do not import (see above)."

fingerprint "$python" >"$stamp"
echo "$VENV is ready."
