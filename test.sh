#!/usr/bin/env bash
# Set up a virtual environment and run the quick tests (at most 5 minutes on two cores).
#
#   bash test.sh                 the quick tier
#   bash test.sh -k sampler      arguments go to pytest
#   bash test.sh -m slow         several processes, kills and whole runs
#
# NANOMATH_DATA=/path/to/benchmarks adds the tests on public data.
set -euo pipefail
CALLER_DIR="$PWD"
CDPATH="" cd -- "$(dirname "$0")"
source dev/setup.sh
setup_environment test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # pytest and its workers share the cores
exec "$VENV/bin/python" -m pytest "$@"
