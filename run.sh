#!/usr/bin/env bash
# Sets everything up in .venv and trains: recipe `tiny` on a CPU, the largest that fits on GPUs.
# Arguments go to `speedrun start` (those of `speedrun train`), as in ./run.sh --text book.txt
set -euo pipefail
cd "$(dirname "$0")"
source .ci/setup.sh
setup_venv cli
exec .venv/bin/speedrun start "$@"
