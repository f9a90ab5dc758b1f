#!/usr/bin/env bash
# Sets everything up in .venv and runs the tests that need no GPU and little time.
# ./test.sh -m slow runs the long ones; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
source .ci/setup.sh
setup_venv cli test lint
export PYTHONUNBUFFERED=1 # a log cut short still names the test that ran
for argument in "$@"; do
  if [ "$argument" = -m ]; then exec .venv/bin/python -m pytest "$@"; fi
done
exec .venv/bin/python -m pytest -m "not slow and not gpu and not multigpu" "$@"
