#!/usr/bin/env bash
# Sets everything up in .venv and runs the tests that need no GPU and little time.
# ./test.sh -m slow runs the long ones; other arguments go to pytest. Without any, as many tests at
# once as there are cores, eight at most.
# ./test.sh --fixtures PATH: PATH has the shared test data, and no test may skip for want of it.
set -euo pipefail
marker=(-m "not slow and not gpu and not multigpu")
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --fixtures=*)
      set -- --fixtures "${1#*=}" "${@:2}"
      continue
      ;;
    --fixtures) # one word: pytest doesn't know its option yet when it looks for tests in PATH
      folder=$(cd "${2-}" && pwd) || exit 2
      arguments+=("--shared-data=$folder")
      shift 2
      continue
      ;;
    -m) marker=() ;;
  esac
  arguments+=("$1")
  shift
done
cd "$(dirname "$0")"
source .ci/setup.sh
setup_venv cli test lint
export PYTHONUNBUFFERED=1 # a log cut short still names the test that ran
if [[ "${arguments[*]-}" =~ ^(--shared-data=[^ ]*)?$ ]]; then
  arguments+=(-n auto --maxprocesses 8 --dist worksteal)
  export OMP_NUM_THREADS=1 # of several processes that share cores, each would wait for the others
fi
exec .venv/bin/python -m pytest ${marker[@]+"${marker[@]}"} ${arguments[@]+"${arguments[@]}"}
