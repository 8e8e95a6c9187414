#!/usr/bin/env bash
# Makes .venv, or brings it up to date; what is current costs no time.
#
#   tools/setup_env.sh               to pretrain and evaluate; needs no compiler
#   tools/setup_env.sh --operators   also to detect: compiles mmcv's operators (8 minutes on 2 cores)
#   tools/setup_env.sh --dev         also to check, test and document; goes with --operators
#
# pyproject.toml says what is installed, requirements.txt which release.
#
# Variables: PYTHON    interpreter a new .venv is made with (default: python3)
#            MAX_JOBS  parallel compiler processes          (default: all cores)
#            FORCE_CUDA=1  compile mmcv for CUDA where there is no GPU, as on a login node
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON=${PYTHON:-python3} VENV=.venv EXTRAS=openmmlab,robustness,timm
readonly python=$VENV/bin/python
export MAX_JOBS=${MAX_JOBS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() { echo "setup_env: $*" >&2; exit 1; }
say() { echo "[$stage] $*"; }
# The release of a package in requirements.txt.
release() { sed -n "s/^$1==\([^; ]*\).*/\1/p" requirements.txt | head -n 1; }

# A virtual environment holds absolute paths, so a moved checkout is a stale one.
fingerprint() {
  {
    cat requirements.txt pyproject.toml setup.py tools/setup_env.sh
    "$python" -VV
    pwd
    [[ $stage != operators ]] || echo "${FORCE_CUDA:-0}"
  } | cksum
}

current() {
  local stamp=$VENV/ser_mm.$stage.stamp
  [[ -x $python && -f $stamp ]] && [[ $(<"$stamp") == "$(fingerprint)" ]]
}

pip_install() { "$python" -m pip install -qq --no-compile -c requirements.txt "$@"; }

# uv takes half the time of pip, but reads none of pip's settings: where pip is told to look
# elsewhere, or uv fails, pip does it.
install() {
  if [[ -x $VENV/bin/uv ]] && uv_fits; then
    "$VENV/bin/uv" pip install -q --python "$python" -c requirements.txt "$@" && return
    say 'uv failed (see above); pip tries'
  fi
  pip_install "$@"
}
uv_fits() {
  local other='index-url|no-index|proxy|trusted-host|client-cert'
  [[ -n ${SSL_CERT_FILE:-} ]] || other+='|cert'
  pip_settings=${pip_settings-$("$python" -m pip config list)}
  ! grep -qE "\.($other)=" <<<"$pip_settings"
}

# imaug, which mmdet needs, and numpy 2.2 have no common release for 3.14.
python_fits() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null
}

# Two packages provide cv2 and the last one installed wins; on a machine without display libraries
# (libGL) only the headless one loads.
cv2_without_display() {
  "$python" -c 'import cv2' 2>/dev/null ||
    install --force-reinstall --no-deps opencv-python-headless
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
    print(f'torch is built with CUDA {wanted}, nvcc here is of CUDA {found}: mmcv gets CPU '
          'operators only (enough to pretrain and probe; detection on a GPU needs the others)')
    sys.exit(1)
PY
}

base() {
  if ! python_fits "$python"; then
    python_fits "$PYTHON" ||
      fail "Python 3.10, 3.11, 3.12 or 3.13 is needed; name one with PYTHON=/path/to/python."
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$PYTHON cannot make virtual environments; install its venv package (python3-venv)."
    say "making $VENV (seconds)"
    "$PYTHON" -m venv --clear "$VENV"
  else
    say "updating $VENV"
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null
  fi
  # This setuptools: newer ones do not build extensions with this torch, the one of venv is too old
  # for onedl-mmcv's pyproject.toml.
  pip_install setuptools wheel packaging
  ! uv_fits || pip_install --only-binary uv uv || true

  # Pure Python, because build isolation hides torch. pip knows a wheel it has kept by name and
  # release only, so one with operators could come back from its cache; uv the same.
  if [[ $("$python" -m pip list --format=freeze) != *"onedl-mmcv==$(release onedl-mmcv)"* ]]; then
    say "mmcv without its compiled operators (seconds)"
    install --no-cache-dir --no-deps --force-reinstall onedl-mmcv
  fi
  say "torch, OpenMMLab and the rest (some 3 GB to download when new: a minute or more)"
  install --no-build-isolation -e ".[$EXTRAS]"
  cv2_without_display
  "$python" -W ignore -c 'import mmpretrain' >/dev/null ||
    fail "the installed packages do not import (see above)."
}

dev() {
  say "checks, tests and documentation (seconds)"
  install --no-build-isolation -e ".[$EXTRAS,dev,docs]"
  cv2_without_display
}

# Operators compiled earlier, for the CPU: they fit a release of torch and of Python.
kept=${XDG_CACHE_HOME:-$HOME/.cache}/ser_mm/torch-$(release torch)
kept_wheel() {
  local tag
  tag=$("$([[ -x $python ]] && echo "$python" || echo "$PYTHON")" -c \
    'import sys; print("cp%d%d" % sys.version_info[:2])')
  compgen -G "$kept/onedl_mmcv-$(release onedl-mmcv)-$tag-$tag-*$(uname -m).whl" | head -n 1
}

# Whatever the compilation needs is checked before anything is installed.
check_compiler() {
  compgen -G "$VENV/lib/python*/site-packages/mmcv/_ext*" >/dev/null && return
  [[ -z $(kept_wheel) ]] || return 0
  command -v "${CXX:-c++}" >/dev/null ||
    fail "a C++ compiler is needed to build mmcv's operators; install g++ or name one with CXX."
  "$([[ -x $python ]] && echo "$python" || echo "$PYTHON")" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    fail "Python's headers are needed to build mmcv's operators; install python3-dev."
}

operators() {
  local cuda=0 reason wheel built=$VENV/wheels
  if can_compile_cuda; then cuda=1; fi
  if ops_work $cuda 2>/dev/null; then
    say "mmcv's compiled operators are here already"
  elif wheel=$(kept_wheel) && [[ -n $wheel ]] && ((!cuda)) &&
    pip_install --no-deps --force-reinstall "$wheel" && ops_work 2>/dev/null; then
    say "mmcv's compiled operators, as kept in $kept"
  else
    say "compiling mmcv's operators, $MAX_JOBS at a time (8 minutes on two cores; more for CUDA)"
    install ninja
    # mmcv compiles for CUDA whenever it sees a GPU; hide it where that cannot succeed. Build
    # isolation would hide torch, and then mmcv builds without its operators and says nothing.
    rm -rf "$built"
    (
      ((cuda)) || export CUDA_VISIBLE_DEVICES=
      "$python" -m pip wheel -qq -c requirements.txt -w "$built" \
        --no-deps --no-build-isolation --no-cache-dir --no-binary onedl-mmcv onedl-mmcv
    )
    pip_install --no-deps --force-reinstall "$built"/onedl_mmcv-*.whl
    reason=$(ops_work $cuda 2>&1) || fail "mmcv's operators do not load: ${reason##*$'\n'}"
    # Those for CUDA fit one kind of GPU: not kept.
    ((cuda)) || { mkdir -p "$kept" && cp "$built"/onedl_mmcv-*.whl "$kept"; } || true
    rm -rf "$built"
  fi
  say "MMDetection (seconds)"
  install --no-build-isolation -e ".[$EXTRAS,detection]"
  cv2_without_display
}

stages=base
for argument; do
  case $argument in
    --operators | --dev) stages+=" ${argument#--}" ;;
    *) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
  esac
done

for stage in $stages; do
  [[ $stage != operators ]] || current || check_compiler
done
for stage in $stages; do
  if ! current; then
    rm -f "$VENV/ser_mm.$stage.stamp"
    $stage
    fingerprint >"$VENV/ser_mm.$stage.stamp"
    echo "$VENV is ready ($stage)."
  fi
done
