#!/usr/bin/env bash
# All checks, the quick ones first: formatting, lint, types, then the tests. On the CPU alone.
# Arguments go to pytest, e.g. bash scripts/run_tests.sh tests/test_search.py -k threshold
# Without any, all tests run, in two processes: much of their time is compiling, which uses one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for flag in "$@"; do
    if [[ "$flag" == --help || "$flag" == -h ]]; then # instead of pytest's, after all the other checks
        sed -n '2,/^set /s/^# //p' scripts/run_tests.sh
        exit
    fi
done
source scripts/setup_env.sh test
export JAX_PLATFORMS=cpu
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # do not ask the network for a newer version

"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m pyright --pythonpath "$PYTHON"
[[ $# -gt 0 ]] || set -- -n 2 --dist=worksteal
exec "$PYTHON" -m pytest "$@"
