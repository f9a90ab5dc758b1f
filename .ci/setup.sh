# Sourced by run.sh and test.sh: `setup_venv EXTRA…` makes .venv and installs the package into it.
# A stamp in .venv makes the second call quick. Variables: PYTHON (interpreter for a new .venv),
# SPEEDRUN_TORCH_INDEX (wheel index for torch, such as one with builds for another CUDA or without),
# SPEEDRUN_CUDA (auto, 0, 1: whether to build the CUDA kernels).

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python python3.13 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python >= 3.10 found (tried ${PYTHON:-python3 and others}); set PYTHON=/path/to/python"
}

# Path of the CUDA compiler, or nothing.
find_nvcc() {
  PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin" command -v nvcc || true
}

# What decides whether an install is still the right one.
stamp_of() {
  cat pyproject.toml constraints.txt setup.py CMakeLists.txt .ci/setup.sh
  find csrc pyext -type f -print0 | sort -z | xargs -0 cat
  printf '%s\n' "$@" "${SPEEDRUN_TORCH_INDEX:-}" "${SPEEDRUN_CUDA:-auto}"
  find_nvcc
  ls /dev/nvidia0 2>/dev/null || true
}

# One install after the other: two at once in one .venv would spoil it. The subshell gives the lock
# back however the set-up ends; kept open, it would make a test.sh called by .ci/run wait for ever.
setup_venv() {
  (
    if command -v flock >/dev/null; then flock 9; fi
    install_into_venv "$@"
  ) 9>.venv.lock
}

install_into_venv() {
  local extras python stamp packages
  extras=$(IFS=,; echo "$*")
  stamp=$(stamp_of "$extras" | cksum)
  if [ "$(cat ".venv/stamp-$extras" 2>/dev/null)" = "$stamp" ]; then
    return
  fi
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "set-up: making .venv with $("$python" --version)"
    "$python" -m venv .venv ||
      fail "$python can't make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
  fi
  python=.venv/bin/python
  "$python" -m pip install --quiet --upgrade pip ||
    fail "pip can't reach its package index; check the network, or pip's index settings"
  # Torch comes first: a constraint doesn't reach pip's isolated builds, and ours needs none.
  packages=(torch numpy setuptools cmake ninja pybind11)
  if [ -n "$(find_nvcc)" ]; then
    packages+=(nvidia-cutlass) # headers of the CUDA kernels; the tests compile them without a GPU
  fi
  local options=(-c constraints.txt ${SPEEDRUN_TORCH_INDEX:+--extra-index-url "$SPEEDRUN_TORCH_INDEX"})
  "$python" .ci/download_size.py "$extras" "${options[@]}" "${packages[@]}" || true
  echo "set-up: installing ${packages[0]} and the build tools"
  "$python" -m pip install --quiet "${options[@]}" "${packages[@]}" || fail "pip could not install them"
  echo "set-up: building and installing speedrun [$extras]"
  "$python" -m pip install --quiet "${options[@]}" --no-build-isolation -e ".[$extras]" ||
    fail "the build failed; its output is above and in build/*/build.log"
  echo "$stamp" >".venv/stamp-$extras"
}
