#!/usr/bin/env bash
# Creates .venv/ with everything that training and the tests need. `make setup` calls this; once is enough.
#
#   PYTHON=python3.12 launch/setup.sh      with another Python (3.11 or newer)
#   EXTRAS=harness launch/setup.sh        with more of pyproject.toml's optional dependencies
#   TORCH=gpu|cpu|auto launch/setup.sh     which build of torch (auto: looks for a GPU on this machine; use gpu on a
#                                          cluster's login node without one)
#   TORCH=cu126 launch/setup.sh            a build from PyTorch's own index, by its name there: for a driver that is too old
#                                          for the newest build, or for AMD GPUs (rocm...). TORCH_INDEX=URL names a mirror
#
# A torch that is already installed, in .venv/ or in $PYTHON itself, is kept, unless TORCH asks for another build. If it was
# interrupted, run it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3} TORCH=${TORCH:-auto}
venv=.venv stamp=.venv/.set-up unfinished=.venv/.unfinished
# PyTorch's own index, used for torch only: for a build by name, and for the CPU build if pip's configuration offers none.
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl}
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-$TORCH_INDEX/cpu}
TORCH_CPU_VERSION=${TORCH_CPU_VERSION:-2.13.0+cpu}
TORCH_FLOOR=2.11 # as in pyproject.toml

say() { echo "set-up: $*"; }
die() { echo "set-up: $*" >&2; exit 1; }

# Prints the version of the torch that a Python can import, if it is new enough.
torch_of() {
  "$1" -c "import torch; v = torch.__version__
if tuple(map(int, v.split('.')[:2])) >= tuple(map(int, '$TORCH_FLOOR'.split('.'))): print(v)" 2>/dev/null || true
}

# Prints which build it is: cpu, cu126, rocm7.2. Not by an import: torch's own dependencies may be missing.
build_of() {
  "$1" -c "import importlib.util, runpy
build = runpy.run_path(importlib.util.find_spec('torch').submodule_search_locations[0] + '/version.py')
cuda, hip = build.get('cuda'), build.get('hip')
print('cu' + cuda.replace('.', '') if cuda else build['__version__'].partition('+')[2] if hip else 'cpu')" 2>/dev/null || true
}

asked=$TORCH
[[ $TORCH =~ ^(auto|gpu|cpu|cu[0-9]+|rocm[0-9.]+)$ ]] ||
  die "TORCH is '$TORCH'; it can be auto, gpu, cpu, or a build that pytorch.org lists, such as cu126"

# One set-up at a time: `make train` and `make test` may be started at the same time.
if command -v flock >/dev/null; then exec 9<pyproject.toml && { flock 9 || say "without a lock: start only one at a time"; }; fi

# --- the virtual environment --------------------------------------------------------------------
check_python() {
  command -v "$PYTHON" >/dev/null || die "there is no $PYTHON here: install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || die \
    "$PYTHON is $("$PYTHON" --version 2>&1 | tail -n 1), but Python 3.11 or newer is needed: make setup PYTHON=/path/to/python3"
  "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || die \
    "$PYTHON lacks the modules venv and ensurepip: install them (on Debian and Ubuntu the package python3-venv), or name another Python: make setup PYTHON=/path/to/python3"
}
# --system-site-packages makes the packages of $PYTHON visible, but not those of another virtual environment.
in_venv() { "$PYTHON" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; }

# An interrupted set-up starts over; a working environment is only updated.
if [[ -e $unfinished ]] || ! $venv/bin/python -c '' 2>/dev/null; then
  check_python
  options=()
  if ! in_venv && [[ -n $(torch_of "$PYTHON") ]]; then options=(--system-site-packages); fi
  say "$venv, with $("$PYTHON" --version)${options:+ and its torch}"
  rm -rf $venv
  mkdir $venv
  touch $unfinished
  "$PYTHON" -m venv ${options[@]+"${options[@]}"} $venv
fi
python=$venv/bin/python
$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die \
  "$venv was made with $($python --version), but Python 3.11 or newer is needed: remove $venv and run it again"
$python -m pip --version >/dev/null 2>&1 || $python -m ensurepip >/dev/null
pip() { $python -m pip --disable-pip-version-check install --quiet "$@"; }

# --- uv takes seconds where pip takes minutes; pip is the fallback ------------------------------------
uv=$(command -v uv || true)
if grep -q 'include-system-site-packages = true' $venv/pyvenv.cfg; then
  uv= # it would not see the packages outside and install torch once more
elif [[ -z $uv ]]; then
  $python -c 'import uv' 2>/dev/null || pip uv 2>/dev/null || say "uv is unavailable, falling back to pip (slower)"
  if [[ -x $venv/bin/uv ]]; then uv=$venv/bin/uv; fi
fi
# uv does not read pip's configuration.
index=${PIP_INDEX_URL:-$($python -m pip config get global.index-url 2>/dev/null || true)}
if [[ -n $index ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
links=()
if [[ -n ${PIP_FIND_LINKS:-} ]]; then
  for link in $PIP_FIND_LINKS; do links+=(--find-links "$link"); done
fi
with_uv() { [[ -n $uv ]] && "$uv" pip install --quiet --python $python ${links[@]+"${links[@]}"} "$@"; }
install() {
  with_uv "$@" && return
  if [[ -n $uv ]]; then say "uv failed, retrying with pip"; fi
  pip "$@"
}

# --- torch --------------------------------------------------------------------------------------
source launch/checks.sh
if [[ $TORCH == auto ]]; then
  TORCH=cpu
  if has_nvidia_gpu; then TORCH=gpu; fi # AMD builds are only in PyTorch's index, and must be named
fi
version=$(torch_of $python) build=$(build_of $python)
# Whether the installed torch is what TORCH asks for.
fits() {
  case $asked in
    cpu) [[ $build == cpu ]] ;;
    gpu) [[ $build != cpu || $(uname -s) != Linux ]] ;;
    cu* | rocm*) [[ $build == "$asked" ]] ;;
  esac
}
if [[ -n $version ]] && fits; then
  say "keeping torch $version"
elif [[ $TORCH == cu* || $TORCH == rocm* ]]; then
  say "torch, the newest build for $TORCH"
  { [[ -n $uv ]] && "$uv" pip install --quiet --python $python --default-index "$TORCH_INDEX/$TORCH" --reinstall-package torch \
    "torch>=$TORCH_FLOOR"; } ||
    PIP_FIND_LINKS='' PIP_EXTRA_INDEX_URL='' pip --index-url "$TORCH_INDEX/$TORCH" --force-reinstall "torch>=$TORCH_FLOOR" || die \
    "torch $TORCH_FLOOR or newer was not found at $TORCH_INDEX/$TORCH (see above): pytorch.org lists the available builds; TORCH_INDEX=URL names a mirror of $TORCH_INDEX"
elif [[ $TORCH == gpu || $(uname -s) != Linux ]]; then
  say "torch, the registry's newest build"
  install ${version:+--upgrade} "torch>=$TORCH_FLOOR" || die "torch could not be installed (see above): install one of $TORCH_FLOOR or newer into $venv yourself, then run it again"
else
  # The version names the CPU build: if it is unavailable this fails instead of downloading gigabytes of CUDA.
  say "torch $TORCH_CPU_VERSION"
  wheel=(--no-deps "torch==$TORCH_CPU_VERSION")
  with_uv "${wheel[@]}" 2>/dev/null || pip "${wheel[@]}" 2>/dev/null ||
    pip "${wheel[@]}" --index-url "$TORCH_CPU_INDEX" || die \
    "torch $TORCH_CPU_VERSION was found neither where pip looks nor at $TORCH_CPU_INDEX (see above). Name a folder with its wheel: PIP_FIND_LINKS=/path make setup; or another index: TORCH_CPU_INDEX=URL make setup; or install torch $TORCH_FLOOR or newer into $venv yourself and run it again"
fi
version=$($python -c 'import importlib.metadata as m; print(m.version("torch"))') build=$(build_of $python)
fits || die "TORCH=$asked was asked for, but torch $version is built for $build: make clean, then make setup TORCH=$asked"

# --- everything else ------------------------------------------------------------------------------
say "the other packages"
echo "torch==$version" >$venv/constraints.txt # no other package may replace it
install --constraint $venv/constraints.txt --editable ".[dev${EXTRAS:+,$EXTRAS}]" || die \
  "the packages named in pyproject.toml could not be installed (see above): is the package registry reachable? Run it again when it is"

if has_gpu && ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  say "WARNING: torch $version cannot use this machine's GPU (is the driver too old, or is this a build without CUDA?), and" \
    "training runs on the CPU: $(torch_advice)"
fi
echo "$asked" >$venv/.torch
pwd -P >$stamp
rm -f $unfinished
say "done: $($python --version), torch $version, in $venv"
